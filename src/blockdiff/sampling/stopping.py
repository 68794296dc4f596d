"""When a row is finished before its last position.

eos          at the first end-of-text token
second_eos   at the second, the prompt's included (the paper's texts begin with one)
low_entropy  when the last 256 tokens have less than 4 nats: the row is given up

From Python also `StopAtTokens(ids)` and `StopAtText(texts, decode)`, in the place of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import numpy as np

from blockdiff.categorical import Array
from blockdiff.errors import WrongAnswer
from blockdiff.registry import STOPPING_RULES, register_stopping_rule
from blockdiff.sampling.options import Stop, stop_parts, stopping_rules

# The paper's rule: entropy in nats, over so many tokens.
DULL_NATS, DULL_TOKENS = 4.0, 256


class StoppingRule:
    """A rule has a `name` and `length`; one that is registered may be asked for by its name.

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


@dataclass(frozen=True)
class StopAtTokens(StoppingRule):
    """Ends with the first new token that is one of `ids`: a chat's end of a turn, say.

    Example:
        >>> import blockdiff
        >>> from blockdiff.sampling.stopping import StopAtTokens
        >>> model, tokenizer = blockdiff.load("starter")
        >>> period = StopAtTokens(frozenset(tokenizer.encode(".")))
        >>> done = blockdiff.generate(model, "The", tokenizer=tokenizer, stop=["eos", period])
        >>> done.texts[0].count("."), done.finish
        (1, ['stop'])
    """

    ids: frozenset[int]
    name: str = "stop_at_tokens"

    def length(self, tokens: Array, known: int, start: int, eos_token_id: int | None) -> int | None:
        begin = max(known, start)
        found = np.isin(tokens[begin:], list(self.ids)).nonzero()[0]
        return begin + int(found[0]) + 1 if len(found) else None


@dataclass(frozen=True)
class StopAtText(StoppingRule):
    """Ends with the token that completes one of `texts` in what is new.

    `decode`: ids of new tokens → their text.
    """

    texts: tuple[str, ...]
    decode: Callable[[list[int]], str] = field(compare=False)
    name: str = "stop_at_text"

    def length(self, tokens: Array, known: int, start: int, eos_token_id: int | None) -> int | None:
        new = tokens[start:].tolist()
        if not self._complete(new):
            return None
        ends = range(max(known - start, 0) + 1, len(new) + 1)
        return start + next(end for end in ends if self._complete(new[:end]))

    def _complete(self, new: list[int]) -> bool:
        text = self.decode(new)
        return any(one in text for one in self.texts)


def token_entropy(tokens: Array | Sequence[int]) -> float:
    """Entropy in nats of how often each different token occurs among `tokens` [T]; 0 for none."""
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    return float(-(share * np.log(share)).sum())


def rules_of(stop: Stop) -> list[StoppingRule]:
    """The rules of `stop`."""
    named = [STOPPING_RULES.find(name) for name in sorted(stopping_rules(stop))]
    return named + [one for one in stop_parts(stop) if not isinstance(one, str)]


def ends(
    rules: Sequence[StoppingRule],
    tokens: Array,
    known: int,
    start: int,
    end: int,
    eos_token_id: int | None,
) -> list[tuple[int, bool]]:
    """(length, whether it rejects) of the rules that end a row of at most `end` tokens.

    Raises `InputError` for what is no length; else see `StoppingRule.length`.
    """
    found = []
    for rule in rules:
        if rule.rejects and len(tokens) == end:
            continue
        length = rule.length(tokens, known, start, eos_token_id)
        if length is not None:
            if isinstance(length, bool) or not isinstance(length, Integral):
                length = -1  # not a length
            if not start <= length <= len(tokens):
                raise WrongAnswer(
                    f"the stopping rule {rule.name}: `length` must give None, or a whole number "
                    f"from {start}, the prompt's, to {len(tokens)}, the text's so far"
                )
            found.append((int(length), rule.rejects))
    return found


for _rule in (EndOfText(), EndOfText("second_eos", 2), LowEntropy()):
    register_stopping_rule(_rule)
