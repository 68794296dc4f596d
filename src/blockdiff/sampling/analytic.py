"""SEDD's own sampler: Tweedie's denoiser by the network's scores (Lou et al. 2024, section 4.2).

    a masked position becomes v in the step from t to s with probability
        s_v (e^{σ_t − σ_s} − 1) = p̃_v (α_s − α_t)/(1 − α_t),   p̃_v = e^{z_v}/(V − 1)

It is the ancestral sampler with the network's own sum S = Σ_v p̃_v where that has 1: how many
positions are unmasked depends on the network, so that every step needs an evaluation.

Shapes: B rows, n rows still active, P masked positions, L canvas length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from blockdiff.categorical import uniform
from blockdiff.models.denoiser import Denoiser
from blockdiff.noising import total_noise
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.progress import ORDER, Progress, Step
from blockdiff.schedules import get_schedule


def analytic(
    model: Denoiser, canvas: Tensor, starts: Tensor, row_ids: Tensor, options: SamplingOptions
) -> Iterator[Step]:
    """T = `options.steps` evaluations of the whole canvas [B, L]; the last fixes what is left."""
    steps = options.steps
    assert steps is not None
    config, schedule = model.config, get_schedule(options.schedule)
    progress = Progress(model, canvas, starts, row_ids, options)

    def rate_at(step: int) -> Tensor:
        time = torch.tensor((steps - step) / steps, dtype=torch.float64)
        return schedule.mask_rate(time.to(canvas.device))

    for step in range(steps):
        rows = progress.active()
        if not len(rows):
            return
        x = canvas[rows]
        masked = x == config.mask_token_id
        rate, later = rate_at(step), rate_at(step + 1)
        sigma = total_noise(rate).float().expand(len(rows))
        logits = model(x, sigma=sigma, at=masked).logits
        assert logits is not None
        at_row, position = masked.nonzero(as_tuple=True)
        share = float((rate - later) / rate)
        unmask = unmask_probability(logits, share, config.mask_token_id)
        if step == steps - 1:
            unmask = torch.ones_like(unmask)
        chosen = uniform(options.seed, row_ids[rows[at_row]], position, ORDER, step) < unmask
        fixed_rows, fixed_positions = rows[at_row[chosen]], position[chosen]
        tokens = progress.draw(logits[chosen], fixed_rows, fixed_positions)
        canvas[fixed_rows, fixed_positions] = tokens
        yield progress.step(rows, fixed_rows, fixed_positions)


def unmask_probability(logits: Tensor, share: float, mask_token_id: int) -> Tensor:
    """S · `share` [P], at most 1, from logits [P, V]; `share` = (α_s − α_t)/(1 − α_t)."""
    others = torch.arange(logits.shape[-1], device=logits.device) != mask_token_id
    log_sum = logits.float().masked_fill(~others, -torch.inf).logsumexp(-1)
    total = torch.exp(log_sum - math.log(logits.shape[-1] - 1))
    return (total * share).clamp(max=1)
