"""What changes or restricts the logits before an order sees them.

    logit_bias           adds to the logits of some tokens; −inf bans one
    repetition_penalty   of tokens that the row holds: z/p where z > 0, else z·p (Keskar et al. 2019)
    logits_processor     transformers' own, or a callable (input_ids [m, T], scores [m, V]) → scores
    constraint           a text that has to match (`sampling.constraints`)

in this order; classifier-free guidance comes before them all (`sampling.twins`). A guide is told, of
each position, the tokens of its row that are fixed. Some are `in_order`: for them that must be all
the tokens before the position and no others, so the positions of such a row are fixed from left to
right, and one with something unknown before it waits. A constraint is, and so is a processor, which
was written for left-to-right texts, unless it reads no context (`reads_context = False` on it, or
one of those of transformers that look at scores alone).

Shapes: n rows, P positions, V vocabulary, k drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blockdiff.categorical import Array
from blockdiff.errors import InputError
from blockdiff.sampling.constraints import Automaton, allowed_along
from blockdiff.sampling.options import SamplingOptions


class Guide(Protocol):
    """What changes logits; `in_order`: whether it has to know all tokens before a position."""

    in_order: bool

    def __call__(self, logits: Tensor, texts: Sequence[Array]) -> Tensor:
        """New logits [P, V] of old ones, which stay; `texts`: of each position what is fixed."""
        ...


@dataclass(frozen=True)
class RowGuides:
    """What guides one row.

    `text` int64 [T]: the tokens of its prompt and text that are fixed, from left to right.
    """

    guides: Sequence[Guide]
    text: Array
    automaton: Automaton | None = None

    def along(self, logits: Tensor, drafts: Sequence[int]) -> Tensor:
        """Guided logits [k + 1, V] where k drafted tokens follow the text, and one after them.

        Those of position i are guided as if drafts[:i] were fixed. This is what an order verifies
        against: softmax of the warped result is the target distribution of each position. Rows
        behind a draft that the constraint does not allow mean nothing: it has probability 0 there.
        """
        texts = [np.append(self.text, drafts[:i]) for i in range(len(logits))]
        allowed = None if self.automaton is None else allowed_along(self.automaton, drafts)
        return guided(self.guides, logits, texts, allowed)


def guided(
    guides: Sequence[Guide], logits: Tensor, texts: Sequence[Array], allowed: Array | None = None
) -> Tensor:
    """Logits [P, V] after the guides, and −inf where `allowed` bool [P, V] says so.

    What is −inf before stays so.
    """
    never = logits == -torch.inf
    for guide in guides:
        logits = guide(logits, texts)
    if allowed is not None:
        may = torch.from_numpy(allowed).to(logits.device, non_blocking=True)
        width = min(may.shape[1], logits.shape[1])
        never[:, :width] |= ~may[:, :width]
        never[:, width:] = True
    return logits.masked_fill(never, -torch.inf)


class LogitBias:
    """Adds a number to the logits of each of some tokens."""

    in_order = False

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids, self.values = list(bias), list(bias.values())

    def __call__(self, logits: Tensor, texts: Sequence[Array]) -> Tensor:
        logits = logits.clone()
        logits[:, self.ids] += torch.tensor(self.values, dtype=logits.dtype).to(logits.device)
        return logits


class RepetitionPenalty:
    """Tokens that the row holds, wherever they stand, are made less likely."""

    in_order = False

    def __init__(self, penalty: float) -> None:
        self.penalty = penalty

    def __call__(self, logits: Tensor, texts: Sequence[Array]) -> Tensor:
        seen = np.zeros(logits.shape, bool)
        for place, text in enumerate(texts):
            if place and text is texts[place - 1]:
                seen[place] = seen[place - 1]
            else:
                seen[place, text[text < seen.shape[1]]] = True
        held = torch.from_numpy(seen).to(logits.device, non_blocking=True)
        less = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(held, less, logits)


# Processors of transformers that look at the scores alone.
_SCORES_ONLY = {
    *("SuppressTokensLogitsProcessor", "LogitNormalization", "InfNanRemoveLogitsProcessor"),
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"),
    *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "TopHLogitsWarper"),
}


class Processor:
    """A `LogitsProcessor` of transformers, a list of them, or any callable of that kind."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.call = call
        members: Any = call if isinstance(call, list) else [call]
        self.in_order = any(
            getattr(one, "reads_context", type(one).__name__ not in _SCORES_ONLY)
            for one in members
        )

    def __call__(self, logits: Tensor, texts: Sequence[Array]) -> Tensor:
        found = logits.clone()
        lengths = np.array([len(text) for text in texts])
        for length in np.unique(lengths).tolist():
            places = (lengths == length).nonzero()[0].tolist()
            ids = torch.from_numpy(np.stack([texts[place] for place in places])).to(logits.device)
            scores = self.call(ids, found[places])
            if not isinstance(scores, Tensor) or scores.shape != (len(places), logits.shape[1]):
                raise InputError(
                    f"`logits_processor` {_shown(self.call)} must give scores "
                    f"{[len(places), logits.shape[1]]}, as many as it was given"
                )
            found[places] = scores.to(found.dtype)
        return found


def _shown(call: Any) -> str:
    return getattr(call, "__name__", type(call).__name__)


def guides_of(options: SamplingOptions) -> list[Guide]:
    """What guides the rows with these options, but for constraint and twin."""
    found: list[Guide] = []
    if options.logit_bias:
        found.append(LogitBias(options.logit_bias))
    if options.repetition_penalty not in (None, 1):
        found.append(RepetitionPenalty(options.repetition_penalty))
    if options.logits_processor:
        found.append(Processor(options.logits_processor))
    return found
