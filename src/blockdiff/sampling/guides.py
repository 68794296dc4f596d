"""What changes or restricts the logits before an order sees them.

    logit_bias           adds to the logits of some tokens; −inf bans one
    repetition_penalty   z/p of tokens that the row holds where z > 0, else z·p (CTRL, 2019)
    logits_processor     transformers' own, or a callable (input_ids [m, T], scores [m, V]) → scores
    constraint           a text that has to match (`sampling.constraints`)

in this order; classifier-free guidance comes before them all (`sampling.twins`). A guide is told,
of each position, the tokens of its row that are fixed. Some are `in_order`: for them that must be
all the tokens before the position and no others, so the positions of such a row are fixed from left
to right, and one with something unknown before it waits. A constraint is, and so is a processor,
which was written for left-to-right texts, unless it reads no context (`reads_context = False` on
it, or one of those of transformers that look at scores alone).

Shapes: n rows, P positions, V vocabulary, k drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blockdiff.categorical import Array
from blockdiff.data.chat_templates import TurnEnd
from blockdiff.errors import InputError, WrongAnswer
from blockdiff.models.denoiser import Denoiser
from blockdiff.sampling.constraints import Automaton, Constraint, allowed_along, constrain
from blockdiff.sampling.options import NEED_TOKENIZER, SamplingOptions, stop_parts
from blockdiff.sampling.stopping import StopAtText, StopAtTokens, StoppingRule

NO_TOKEN = "the constraint and what else changes the logits leave no token"


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
        whole = np.append(self.text, np.asarray(drafts, np.int64))
        texts = [whole[: len(self.text) + i] for i in range(len(logits))]
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
    """A `LogitsProcessor` of transformers, or any callable of that kind."""

    def __init__(self, call: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.call = call
        default = type(call).__name__ not in _SCORES_ONLY
        self.in_order = bool(getattr(call, "reads_context", default))

    def __call__(self, logits: Tensor, texts: Sequence[Array]) -> Tensor:
        found = logits.clone()
        lengths = np.array([len(text) for text in texts])
        for length in np.unique(lengths).tolist():
            places = (lengths == length).nonzero()[0].tolist()
            ids = torch.from_numpy(np.stack([texts[place] for place in places])).to(logits.device)
            scores = self.call(ids, found[places])
            name = getattr(self.call, "__name__", type(self.call).__name__)
            if not isinstance(scores, Tensor) or scores.shape != (len(places), logits.shape[1]):
                raise WrongAnswer(
                    f"`logits_processor` {name} must give scores for {len(places)} positions and "
                    f"{logits.shape[1]} tokens, as many as it was given"
                )
            if not (scores < torch.inf).all():
                raise WrongAnswer(
                    f"`logits_processor` {name} gives scores that are no numbers, or infinite; "
                    "−inf alone bans a token"
                )
            found[places] = scores.to(found.dtype)
        return found


@dataclass(frozen=True)
class Guides:
    """What guides rows with the same options."""

    guides: Sequence[Guide]
    constraint: Constraint | None

    @classmethod
    def of(cls, options: SamplingOptions) -> Guides:
        found: list[Guide] = []
        bias: Any = options.logit_bias
        if bias:
            found.append(LogitBias(bias))
        if options.repetition_penalty not in (None, 1):
            found.append(RepetitionPenalty(options.repetition_penalty))
        calls = options.logits_processor or ()
        calls = calls if isinstance(calls, list | tuple) else [calls]
        return cls([*found, *map(Processor, calls)], options.constraint)

    def __bool__(self) -> bool:
        return bool(self.guides) or self.constraint is not None

    @property
    def in_order(self) -> bool:
        """Whether the positions of the rows are fixed from left to right."""
        return self.constraint is not None or any(guide.in_order for guide in self.guides)


def chosen_in_order(
    choose: Callable[[Tensor, Array, Array], tuple[Tensor | None, Tensor]],
    logits: Tensor,
    wanted: Array,
    rows: Sequence[RowGuides],
) -> tuple[Tensor, Tensor]:
    """(which are fixed bool [P], tokens int64 [P]) of positions that are decided one by one.

    In each row from left to right: position p is fixed where the order, asked with the guided
    logits of the wanted positions up to p, would fix them all; the next one sees p's token. The row
    stops at the first position that the order declines, and where its constraint lets nothing
    follow. `choose(logits, wanted, places)` asks it of those of the n rows.
    """
    owner, device = wanted.nonzero()[0], logits.device
    first = np.searchsorted(owner, np.arange(len(rows)))  # places of the rows' positions in P
    count = wanted.sum(1)
    ahead = [row.automaton.copy() if row.automaton is not None else None for row in rows]
    texts = [row.text for row in rows]
    all_guided, fixed, drawn = logits.clone(), np.zeros(len(owner), bool), np.zeros_like(owner)
    going = np.arange(len(rows))
    for step in range(int(count.max())):
        going = going[count[going] > step]
        if not len(going):
            break
        now = first[going] + step
        allowed = None
        if ahead[0] is not None:
            allowed = np.stack([one.allowed() for one in (ahead[i] for i in going) if one])
        at = torch.from_numpy(now).to(device)
        new = guided(rows[0].guides, logits[at], [texts[i] for i in going], allowed)
        if allowed is not None and not bool((new > -torch.inf).any(1).all()):
            raise InputError(NO_TOKEN)
        all_guided[at] = new
        asked = np.zeros_like(wanted[going])
        for place, row in enumerate(going):
            asked[place, wanted[row].nonzero()[0][: step + 1]] = True
        every = np.concatenate([np.arange(first[i], first[i] + step + 1) for i in going])
        chosen, tokens = choose(all_guided[torch.from_numpy(every).to(device)], asked, going)
        took = np.ones(len(every), bool) if chosen is None else chosen.cpu().numpy()
        took = np.asarray(took.reshape(len(going), step + 1).all(1))
        new_tokens = tokens.cpu().numpy().reshape(len(going), step + 1)[:, -1]
        fixed[now], drawn[now] = took, new_tokens
        for row, token in zip(going[took].tolist(), new_tokens[took].tolist(), strict=True):
            texts[row] = np.append(texts[row], token)
            automaton = ahead[row]
            if automaton is not None:
                automaton.advance(token)
                took[going == row] = not automaton.finished
        going = going[took]
    return torch.from_numpy(fixed), torch.from_numpy(drawn).to(device)


def bound(
    options: SamplingOptions,
    model: Denoiser,
    tokenizer: Any,
    ends: Collection[int] | None = None,
) -> SamplingOptions:
    """The options with what needs a tokenizer made ready: constraint and stop strings.

    `ends`: the ids that end a text, the model's by default. Raises `InputError` for what cannot be
    written, before any evaluation.
    """
    changes: dict[str, Any] = {}
    config = model.config
    needs = [name for name in NEED_TOKENIZER if getattr(options, name) is not None]
    if needs and tokenizer is None:
        raise InputError(f"`{needs[0]}` needs the model's tokenizer; give `tokenizer`")
    for name in needs:
        value, changes[name] = getattr(options, name), None
        if name == "stop_strings":
            changes["stop"] = [*stop_parts(options.stop), StopAtText(value, tokenizer.decode)]
            continue
        if ends is None:
            ends = () if config.eos_token_id is None else (config.eos_token_id,)
        banned = [config.mask_token_id]
        if model.drawable is not None:
            banned += (~model.drawable).nonzero().squeeze(-1).tolist()
        changes["constraint"] = constrain(
            tokenizer, **{name: value}, vocab_size=config.vocab_size, eos_token_id=sorted(ends),
            banned=banned,
        )  # fmt: skip
    return replace(options, **changes) if changes else options


def bound_to_answer(
    options: SamplingOptions, model: Denoiser, tokenizer: Any, turn: TurnEnd, ends: frozenset[int]
) -> SamplingOptions:
    """`bound`, of a chat's answer: it ends with one of the tokens `ends`, or the turn's text."""
    stop: list[str | StoppingRule] = [*stop_parts(options.stop), StopAtTokens(ends)]
    if turn.text:
        stop.append(StopAtText((turn.text,), tokenizer.decode))
    return bound(replace(options, stop=stop), model, tokenizer, ends)
