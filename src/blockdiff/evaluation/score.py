"""How likely a continuation is, given its beginning; rows of any lengths, text apart (see `api`).

A row is laid out as in sampling: beginning, continuation, and mask tokens up to the end of its last
block. Only the continuation is masked and counts, so

    nats ≥ −log p_θ(continuation | beginning)        (equal for an AR model)

where a block that the beginning enters keeps its first tokens clean, as a prompt does.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from blockdiff.errors import InputError
from blockdiff.estimators import Estimator
from blockdiff.evaluation.likelihood import likelihood, tokens_per_pass
from blockdiff.models.denoiser import Denoiser
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions


@dataclass(frozen=True)
class Score:
    """A continuation's likelihood.

    Attributes:
        nats: Upper bound on −log p(continuation | beginning); exact for AR models.
        error: Standard error of `nats` by the masks that were drawn; 0 where none were.
        tokens: Tokens of the continuation.
        greedy: Whether greedy decoding from the beginning gives the continuation; None where it was
            not asked for.

    Example:
        >>> import blockdiff
        >>> blockdiff.Score(nats=2.0, error=0.0, tokens=4, greedy=True).nats_per_token
        0.5
    """

    nats: float
    error: float
    tokens: int
    greedy: bool | None = None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens


def score_tokens(
    model: Denoiser,
    beginnings: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    estimator: str | Estimator = "auto",
    draws: int = 8,
    timesteps: int = 1000,
    seed: int = 0,
    greedy: bool = True,
    block_size: int | None = None,
    batch_size: int | None = None,
    budget: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The score of each continuation given its beginning, both token ids and neither empty.

    Of a row that is longer than the model's context L its last L tokens are taken. Masks, and the
    order in which a block diffusion model decodes greedily (its sampler is first_hitting), depend
    on `seed` and the row's own tokens, not on the other rows. `block_size`: L' of the bound, the
    model's own when left out. `budget`: as in `likelihood`. `progress` is called with the number of
    rows that are measured. Raises `InputError` for an empty part, or a continuation that leaves no
    room for a token before it.
    """
    length = model.config.length
    size = model.config.block_size if block_size is None else block_size
    rows: list[tuple[list[int], int]] = []
    for number, (before, after) in enumerate(zip(beginnings, continuations, strict=True), start=1):
        check_pair(before, after, length, number)
        rows.append(([*before, *after][-length:], len(after)))
    addresses = [address(row) for row, _ in rows]

    groups: dict[int, list[int]] = defaultdict(list)
    for i, (row, _) in enumerate(rows):
        # Few lengths, each a power of two of blocks, so that a short row is not padded to a long.
        blocks = 1 << (-(-len(row) // size) - 1).bit_length()
        # In a block that is as long as its text, padding would be read.
        whole = model.config.kind == "mdlm" and not model.config.slides
        groups[len(row) if whole else min(blocks * size, length)].append(i)
    measured: dict[int, tuple[float, float]] = {}
    for padded, members in groups.items():
        padding = min(
            model.config.mask_token_id, model.config.vocab_size - 1
        )  # AR may have no mask
        x_0 = torch.full((len(members), padded), padding, device=model.device)
        maskable = torch.zeros_like(x_0, dtype=torch.bool)
        for place, i in enumerate(members):
            row, new = rows[i]
            x_0[place, : len(row)] = torch.tensor(row)
            maskable[place, len(row) - new : len(row)] = True
        found = likelihood(
            model, x_0, estimator, draws, seed, timesteps=timesteps, maskable=maskable,
            block_size=block_size,
            rows=torch.tensor([addresses[i] for i in members]), batch_size=batch_size,
            budget=budget, progress=progress,
        )  # fmt: skip
        assert found.errors is not None
        pairs = zip(found.nats.tolist(), found.errors.tolist(), strict=True)
        measured |= dict(zip(members, pairs, strict=True))
    same = _greedy(model, rows, addresses, seed, batch_size, budget) if greedy else {}
    return [Score(*measured[i], rows[i][1], same.get(i)) for i in range(len(rows))]


def check_pair(before: Sequence[int], after: Sequence[int], length: int, number: int) -> None:
    """Raises `InputError` for an empty part, or an `after` that leaves no room for a token."""
    if not len(before) or not len(after):
        what = "continuation" if len(before) else "beginning"
        raise InputError(f"the {what} of pair {number} is empty; give at least one token")
    if len(after) >= length:
        raise InputError(
            f"the continuation of pair {number} has {len(after)} tokens: with one before it "
            f"that is more than the model's context of {length}"
        )


def address(row: Sequence[int]) -> int:
    """The number by which a row's random numbers are drawn: a hash of its tokens."""
    return zlib.crc32(np.array(row, dtype=np.int64).tobytes()) & (2**31 - 1)


def _greedy(
    model: Denoiser,
    rows: Sequence[tuple[list[int], int]],
    addresses: Sequence[int],
    seed: int,
    batch_size: int | None,
    budget: int | None,
) -> dict[int, bool]:
    """Whether each row is what greedy decoding makes of its beginning."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i, (_, new) in enumerate(rows):
        groups[new].append(i)
    same = {}
    for new, members in groups.items():
        options = SamplingOptions(max_new_tokens=new, temperature=0.0, seed=seed, stop="none")
        longest = max(len(rows[i][0]) for i in members)
        fits = max(1, (budget or tokens_per_pass(model)) // (2 * longest))
        at_once = fits if batch_size is None else batch_size
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            prompts = [rows[i][0][:-new] for i in part]
            done = generate_tokens(model, prompts, options, [addresses[i] for i in part])
            for i, tokens in zip(part, done.tokens, strict=True):
                same[i] = list(tokens) == rows[i][0][-new:]
    return same
