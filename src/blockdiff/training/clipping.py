"""Which clip a run should draw its mask rates from (paper, section 5).

    (β, ω) = argmin over a grid of  Var over blocks of  (1/rate) Σ_{ℓ masked in b} CE_ℓ,
                                    rate ~ U[β, ω]

A narrow clip has less variance than a wide one and bounds the likelihood less well; which is best
depends on the model, so the search is repeated as it learns. Every clip is measured on the same
text with the same uniform numbers, so that their differences are not noise of the masks alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockdiff.estimators import make_estimator
from blockdiff.evaluation.likelihood import addressed_noise
from blockdiff.laws import objective_of
from blockdiff.models.denoiser import Denoiser
from blockdiff.training.config import WHOLE

WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
STEP = 0.05
ALWAYS = (1.0, 1.0)
WINDOWS = 128  # of the validation text, which a search looks at


@dataclass(frozen=True)
class ClipVariance:
    """The variance over blocks of the loss, in nats² per token², under one clip."""

    beta: float
    omega: float
    variance: float


def clip_grid(block_size: int) -> list[tuple[float, float]]:
    """No clip at all, then (β, ω) of every width, β in steps of 0.05.

    A block of one token is masked or not: there the other candidate is the paper's tuned schedule,
    which always masks it.
    """
    if block_size == 1:
        return [WHOLE, ALWAYS]
    grid = [WHOLE]
    for width in WIDTHS:
        for i in range(round((1 - width) / STEP) + 1):
            grid.append((round(i * STEP, 2), round(i * STEP + width, 2)))
    return grid


@torch.no_grad()
def clip_variances(
    model: Denoiser,
    x_0: Tensor,
    seed: int,
    documents: Tensor | None = None,
    estimator: str = "clipped",
    counts: Tensor | None = None,
) -> list[ClipVariance]:
    """The variance of the per-block loss under every clip of the grid, on x_0 [B, L].

    `estimator`: the one that is trained with, clipped or clipped_redraw. `counts` bool [B, L]: of
    conversations, the tokens that have a loss. Each clip takes a noised
    pass; all share one pass over the clean text.
    """
    config = model.config
    layout = config.layout_of(x_0.shape[1], documents=documents)
    objective = objective_of(config)
    maskable = objective.counted(x_0, config.keep_first, documents)
    maskable = maskable if counts is None else maskable & counts
    counted = layout.by_block(maskable).sum(-1)
    noise = addressed_noise(torch.arange(len(x_0), device=x_0.device), layout, seed)
    was_training = model.training
    model.eval()
    context = model.encode(x_0, layout) if layout.blocks > 1 else None
    found = []
    for beta, omega in clip_grid(layout.block_size):
        draws = make_estimator(estimator, clip=(beta, omega))
        draw = draws(x_0, layout, noise, maskable, config.mask_token_id)
        nats = objective.drawn(model, x_0, draw, layout, context)
        per_block = layout.by_block(nats).sum(-1)
        per_token = (per_block / counted.clamp(min=1))[counted > 0]
        found.append(ClipVariance(beta, omega, float(per_token.cpu().double().var())))
    model.train(was_training)
    return found


def best_clip(found: list[ClipVariance]) -> ClipVariance:
    """The clip of least variance; of equal ones the widest, which bounds best."""
    return min(found, key=lambda clip: (clip.variance, clip.beta - clip.omega))


def search_clip(
    model: Denoiser,
    x_0: Tensor,
    seed: int,
    documents: Tensor | None = None,
    estimator: str = "clipped",
    counts: Tensor | None = None,
) -> ClipVariance:
    """The clip of least variance on the first `WINDOWS` of x_0 [B, L]; as `clip_variances`."""
    documents = None if documents is None else documents[:WINDOWS]
    counts = None if counts is None else counts[:WINDOWS]
    return best_clip(clip_variances(model, x_0[:WINDOWS], seed, documents, estimator, counts))
