"""When a row is finished before its last position.

eos          at the first end-of-text token
second_eos   at the second, the prompt's included (the paper's texts begin with one)
low_entropy  when the last 256 tokens have less than 4 nats: the row is given up
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockdiff.categorical import Array
from blockdiff.registry import STOPPING_RULES, register_stopping_rule
from blockdiff.sampling.options import stopping_rules

# The paper's rule: entropy in nats, over so many tokens.
DULL_NATS, DULL_TOKENS = 4.0, 256


class StoppingRule:
    """A rule has a `name` and `length`, and is registered.

    `rejects`: whether a row it ends counts as rejected.
    """

    name = ""
    rejects = False

    def length(self, tokens: Array, known: int, start: int, eos_token_id: int | None) -> int | None:
        """The row's final length if it is finished, else None.

        `tokens` int64 [known_now]: prompt and new text up to the first masked position. `known`:
        how many of them the rule was asked about before; `start`: length of the prompt.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class EndOfText(StoppingRule):
    """Ends with the `wanted`-th end-of-text token of prompt and text, at a new one."""

    name: str = "eos"
    wanted: int = 1

    def length(self, tokens: Array, known: int, start: int, eos_token_id: int | None) -> int | None:
        if eos_token_id not in tokens[max(known, start) :]:
            return None
        new = start + (tokens[start:] == eos_token_id).nonzero()[0]
        missing = max(self.wanted - int((tokens[:start] == eos_token_id).sum()), 1)
        return int(new[missing - 1]) + 1 if len(new) >= missing else None


class LowEntropy(StoppingRule):
    """Ends where the last 256 tokens, prompt included, have less than 4 nats."""

    name = "low_entropy"
    rejects = True

    def length(self, tokens: Array, known: int, start: int, eos_token_id: int | None) -> int | None:
        if len(tokens) < DULL_TOKENS or token_entropy(tokens[-DULL_TOKENS:]) >= DULL_NATS:
            return None
        return len(tokens)


def token_entropy(tokens: Array | Sequence[int]) -> float:
    """Entropy in nats of how often each different token occurs among `tokens` [T]; 0 for none."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log(share)).sum())


def rules_of(stop: str) -> list[StoppingRule]:
    """The rules that `stop` names, those that do not reject first."""
    rules = [STOPPING_RULES.find(name) for name in sorted(stopping_rules(stop))]
    return sorted(rules, key=lambda rule: rule.rejects)


for _rule in (EndOfText(), EndOfText("second_eos", 2), LowEntropy()):
    register_stopping_rule(_rule)
