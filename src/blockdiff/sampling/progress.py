"""What the rows of a generation share, whichever way their tokens are found.

Shapes: B rows, n rows still active, P chosen positions, S canvas length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.cache import BlockCache
from blockdiff.categorical import draw, uniform
from blockdiff.models.denoiser import Denoiser
from blockdiff.sampling.options import SamplingOptions, stopping_rules
from blockdiff.sampling.stopping import finished_length, is_dull

# What a random number is for, the last part of its address; a token drawn anew counts on.
ORDER, TOKEN = 0, 1


@dataclass(frozen=True)
class Step:
    """The state after one network evaluation.

    `tokens` int64 [B, S]: prompt and text so far, the mask token where nothing is fixed.
    `fixed` bool [B, S]: the positions this step fixed. `nfe` int64 [B]: network evaluations of each
    row so far, the prompt's included. `lengths` int64 [B]: final length of a finished row (prompt
    and EOS included), −1 while it goes on. `rejected` bool [B]: rows ended by the low-entropy rule.

    Example:
        >>> import blockdiff
        >>> model, tokenizer = blockdiff.load("starter")
        >>> *_, last = blockdiff.stream(model, [[1, 2]], max_new_tokens=2, stop="none")
        >>> isinstance(last, blockdiff.Step), last.lengths.tolist()
        (True, [4])
    """

    tokens: Tensor
    fixed: Tensor
    nfe: Tensor
    lengths: Tensor
    rejected: Tensor

    @property
    def done(self) -> Tensor:
        return self.lengths >= 0


class Progress:
    """What all rows share: the canvas, the counts, and the making of steps."""

    def __init__(
        self,
        model: Denoiser,
        canvas: Tensor,
        starts: Tensor,
        row_ids: Tensor,
        options: SamplingOptions,
    ) -> None:
        self.canvas, self.starts, self.row_ids, self.options = canvas, starts, row_ids, options
        self.ends = starts + options.max_new_tokens
        self.nfe = torch.zeros_like(starts)
        self.lengths = torch.full_like(starts, -1)
        self.mask_token_id = model.config.mask_token_id
        # Ids of a padded vocabulary that no token has: see `models.loading.load`.
        drawable = getattr(model, "drawable", None)
        self.no_token = None if drawable is None else ~drawable.to(canvas.device)
        self.rejected = torch.zeros_like(starts, dtype=torch.bool)
        self.rules = stopping_rules(options.stop)
        # Which EOS of a row ends it, and how many its prompt holds already.
        self.eos_token_id = model.config.eos_token_id if "eos" in "".join(self.rules) else None
        self.wanted_eos = torch.ones_like(starts)
        if "second_eos" in self.rules and self.eos_token_id is not None:
            position = torch.arange(canvas.shape[1], device=canvas.device)
            prompt = (canvas == self.eos_token_id) & (position < starts[:, None])
            self.wanted_eos = (2 - prompt.sum(-1)).clamp(min=1)

    def active(self) -> Tensor:
        return (self.lengths < 0).nonzero().squeeze(-1)

    def active_in(self, cache: BlockCache) -> Tensor:
        """The active rows, in the order of the cache, which forgets the others."""
        finished = self.lengths[cache.rows] >= 0
        if bool(finished.any()):
            cache.drop(finished.nonzero().squeeze(-1))
        return cache.rows

    def draw(self, logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Tokens for `rows` [P] at `positions` [P] from logits [P, V]."""
        logits = logits.float()
        logits[:, self.mask_token_id] = -torch.inf
        if self.no_token is not None:
            logits.masked_fill_(self.no_token, -torch.inf)
        seed, ids = self.options.seed, self.row_ids[rows]
        return draw(
            logits,
            lambda which, attempt: uniform(seed, ids[which], positions[which], TOKEN + attempt),
            temperature=self.options.temperature,
            top_k=self.options.top_k,
            top_p=self.options.top_p,
            top_p_rule=self.options.top_p_rule,
        )

    def step(self, rows: Tensor, fixed_rows: Tensor, fixed_positions: Tensor) -> Step:
        """Counts an evaluation of `rows`, sees which are finished, and reports."""
        self.nfe[rows] += 1
        fixed = torch.zeros_like(self.canvas, dtype=torch.bool)
        fixed[fixed_rows, fixed_positions] = True
        self.lengths[rows] = finished_length(
            self.canvas[rows],
            self.starts[rows],
            self.ends[rows],
            self.mask_token_id,
            self.eos_token_id,
            self.wanted_eos[rows],
        )
        if "low_entropy" in self.rules:
            going = rows[self.lengths[rows] < 0]
            dull, known = is_dull(
                self.canvas[going], self.starts[going], self.ends[going], self.mask_token_id
            )
            self.rejected[going] = dull
            self.lengths[going] = torch.where(dull, known, -1)
        state = (self.canvas, fixed, self.nfe, self.lengths, self.rejected)
        return Step(*(x.clone() for x in state))
