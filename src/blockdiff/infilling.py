"""Filling gaps in a text: what stands before a gap and, as far as the model can see it, behind it.

    "The people [[gap:5]] of these States"      five tokens
    "The people [[gap:2-8]] of these States"    two to eight, as many as fit best
    "The people [[gap]] of these States"        one to sixteen

A gap is filled like any new text, with the text behind it on the canvas. A model of one block
(L' = L) sees all of that; block diffusion sees what lies in the block in which the gap ends; an AR
model nothing. The likelihood of the text behind a gap sees the gap in any case: where several
fillings are tried, or several lengths, the one is taken that has the fewest nats a token,

    −log p_θ(gap, text behind | text before) / their tokens

bounded as in `score`. Gaps are filled from left to right; one that is still open is masked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

from transformers import PreTrainedTokenizerBase

from blockdiff.api import Options, continuation, encode_prompts, merge_options
from blockdiff.checks import numbers, whole_number
from blockdiff.errors import InputError
from blockdiff.evaluation.score import score_tokens
from blockdiff.models.denoiser import Conventions, Denoiser
from blockdiff.sampling.engine import Engine
from blockdiff.sampling.generate import steps_of
from blockdiff.sampling.options import NEED_TOKENIZER, SamplingKeywords, SamplingOptions

_GAP = re.compile(r"\[\[gap(?::([^\]]*))?\]\]")
_LENGTHS = re.compile(r"\s*(\d{1,9})\s*(?:(?:-|\.\.)\s*(\d{1,9})\s*)?")
OPEN = (1, 16)  # tokens of a gap that does not say how many


@dataclass(frozen=True)
class Filled:
    """A text whose gaps are filled.

    Attributes:
        text: The whole text.
        gaps: What stands in each gap.
        tokens: Ids of each gap.
        seen: Of each gap, how many tokens of the text behind it the model saw while filling it.
        behind: How many there are, up to the next gap.
        nats: Of each gap, the bound on −log p(gap, text behind | text before) that it was chosen
            by, in nats a token, where there was a choice, else None.
        nfe: Network evaluations of all fillings that were tried.

    Example:
        >>> import blockdiff
        >>> done = blockdiff.Filled("a b c", [" b"], [[5]], [1], [1], [None], 2)
        >>> model, _ = blockdiff.load("starter")
        >>> done.blind(model.config) is None  # all of the text behind the gap was seen
        True
    """

    text: str
    gaps: list[str]
    tokens: list[list[int]]
    seen: list[int]
    behind: list[int]
    nats: list[float | None]
    nfe: int

    def blind(self, config: Conventions) -> str | None:
        """A line that says so where text behind a gap was not seen."""
        missed = [i for i, (s, b) in enumerate(zip(self.seen, self.behind, strict=True)) if s < b]
        if not missed:
            return None
        which = "gap " + ", ".join(str(i + 1) for i in missed)
        if config.causal:
            return f"{which}: an AR model does not see the text behind a gap; `tries` chooses by it"
        return (
            f"{which}: only the text in the block in which the gap ends is seen, "
            + ", ".join(f"{self.seen[i]} of {self.behind[i]} tokens" for i in missed)
            + "; a larger `block_size` sees more, and `tries` chooses by all of it"
        )


def parse_gaps(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The texts around the gaps, one more than these, and each gap's least and most tokens.

    Raises `InputError` for a text without a gap, and a gap of no tokens.

    Example:
        >>> from blockdiff.infilling import parse_gaps
        >>> parse_gaps("a [[gap:3]] b [[gap:1-4]]")
        (['a ', ' b ', ''], [(3, 3), (1, 4)])
    """
    between, lengths, at = [], [], 0
    for found in _GAP.finditer(text):
        between.append(text[at : found.start()])
        at = found.end()
        said = found[1]
        if said is None:
            lengths.append(OPEN)
            continue
        numbers_in = _LENGTHS.fullmatch(said)
        least, most = (numbers_in[1], numbers_in[2] or numbers_in[1]) if numbers_in else (0, 0)
        if not 1 <= int(least) <= int(most):
            raise InputError(
                f"the gap {found[0]!r} is none; write [[gap:20]], [[gap:5-20]] or [[gap]], of at "
                "least one token"
            )
        lengths.append((int(least), int(most)))
    if not lengths:
        raise InputError("there is no gap in the text; write [[gap:20]] where 20 tokens lack")
    return [*between, text[at:]], lengths


def infill(
    model: Denoiser,
    text: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    samples: int = 1,
    tries: int = 1,
    options: Options | None = None,
    **changes: Unpack[SamplingKeywords],
) -> list[Filled]:
    """Fills the gaps of `text`; as many times as `samples` says, each with its own random numbers.

    `tries`: fillings of each gap and length, of which the likeliest is kept. For the rest see
    `generate`; how many tokens are written is said by the gaps, and nothing stops a text early.
    Raises `InputError` for a text without gaps, and gaps as long as the model's context.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> done = blockdiff.infill(
        ...     model, "The people [[gap:3]] of the United States", tokenizer=tokenizer
        ... )
        >>> len(done[0].tokens[0]), done[0].text.startswith("The people")
        (3, True)
    """
    numbers(samples=samples)
    whole_number("tries", tries)
    for name in ("max_new_tokens", "stop"):
        if name in changes:
            raise InputError(f"`{name}` is said by the gaps of the text; leave it out")
    wish = replace(merge_options(options, model=model, **changes), stop="none")
    for name in (*NEED_TOKENIZER, "constraint"):
        if getattr(wish, name) is not None:
            raise InputError(f"a gap is filled with as many tokens as it has: leave `{name}` out")
    if model.config.kind != "sedd":  # what ends a text does not stand inside one
        known = [one for one in tokenizer.all_special_ids if one < model.config.vocab_size]
        given: Any = wish.logit_bias or {}
        wish = replace(wish, logit_bias=dict.fromkeys(known, -math.inf) | given)
    between, lengths = parse_gaps(text)
    longest = max(most for _, most in lengths)
    if longest >= model.config.length:
        raise InputError(
            f"a gap of {longest} tokens is as long as the model's context of "
            f"{model.config.length}; make it shorter"
        )
    # A blank before a gap belongs to its first word, as in any text that is tokenized.
    parts = [part.rstrip() for part in between[:-1]] + between[-1:]
    return [
        _fill(model, tokenizer, parts, lengths, wish, s, samples, tries) for s in range(samples)
    ]


def _fill(
    model: Denoiser,
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[str],
    lengths: Sequence[tuple[int, int]],
    wish: SamplingOptions,
    sample: int,
    samples: int,
    tries: int,
) -> Filled:
    ids = [_ids(model, tokenizer, part, first=i == 0) for i, part in enumerate(parts)]
    mask = model.config.mask_token_id
    before, written, nfe = list(ids[0]), parts[0], 0
    gaps: list[tuple[str, list[int]]] = []
    nats: list[float | None] = []
    seen: list[int] = []
    for place, (least, most) in enumerate(lengths):
        # Gaps further on are masked, as long as they are at least.
        after = list(ids[place + 1])
        for (open_length, _), known in zip(lengths[place + 1 :], ids[place + 2 :], strict=True):
            after += [mask] * open_length + known
        engine = Engine(model)
        for length in range(least, most + 1):
            engine.admit_all(
                [before] * tries, replace(wish, max_new_tokens=length),
                [sample + t * samples for t in range(tries)], [after] * tries,
            )  # fmt: skip
        *_, last = steps_of(engine)
        nfe += int(last.nfe.sum())
        rows = zip(last.tokens.tolist(), last.lengths.tolist(), strict=True)
        found = [row[len(before) : end] for row, end in rows]
        best, tokens = None, found[0]
        if len(found) > 1:
            best, tokens = _likeliest(model, before, found, ids[place + 1], wish)
        gap = continuation(tokenizer, before, tokens)
        gaps.append((gap, tokens))
        nats.append(best)
        visible = seen_behind(model.config, len(before), len(tokens), len(after), wish.block_size)
        seen.append(min(visible, len(ids[place + 1])))
        before += [*tokens, *ids[place + 1]]
        written += gap + parts[place + 1]
    behind = [len(one) for one in ids[1:]]
    return Filled(written, [g for g, _ in gaps], [t for _, t in gaps], seen, behind, nats, nfe)


def _ids(model: Denoiser, tokenizer: PreTrainedTokenizerBase, part: str, first: bool) -> list[int]:
    start = encode_prompts(model, [""], tokenizer)[0]
    own = encode_prompts(model, [part], tokenizer)[0]
    return own if first else own[len(start) :] if part else []


def _likeliest(
    model: Denoiser,
    before: list[int],
    found: list[list[int]],
    behind: list[int],
    wish: SamplingOptions,
) -> tuple[float, list[int]]:
    """The filling of fewest nats a token, together with the text behind it, as far as it fits."""
    room = model.config.length // 2
    both = [(tokens + behind)[: max(len(tokens), room)] for tokens in found]
    scores = score_tokens(model, [before] * len(both), both, seed=wish.seed, greedy=False)
    nats = [score.nats_per_token for score in scores]
    best = min(range(len(nats)), key=nats.__getitem__)
    return nats[best], found[best]


def seen_behind(
    config: Conventions, before: int, gap: int, behind: int, block_size: int | None = None
) -> int:
    """How many tokens behind a gap the model sees while it fills the gap's last token."""
    if config.causal:
        return 0
    end, size = before + gap, config.sampling_blocks(block_size)[0]
    if size >= config.length:
        return behind if not config.slides else min(behind, max(config.length - end, 0))
    grid = before if config.prompt_grid == "prompt_end" else 0
    return min(behind, (grid - end) % size)
