"""Training losses and likelihood bounds: (model, x_0, draw) → nats per token [B, L].

    ar      −log p_θ(x^i | x^{<i})
    bd3lm   Σ_r weight_r · −log p_θ(x_0^ℓ | x_t^b, x_0^{<b}) at the masked tokens of Draw r

MDLM is `bd3lm` at L' = L. So is SEDD, whose network is fed σ and answers with scores in place of
probabilities: the model's own loss is then the score entropy (see `models.loss`), under the same
weights. No objective asks which estimator made its draw.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Context, DenoiserOutput
from blockdiff.noising import Draw

# A `Denoiser`, or one wrapped by DDP.
Forward = Callable[..., DenoiserOutput]


def maskable_positions(
    x_0: Tensor, keep_first: bool = True, documents: Tensor | None = None
) -> Tensor:
    """bool [B, L]: what counts. Not position 0 when it is kept clean, and not padding.

    `documents` int64 [B, L] holds a negative number at padding.
    """
    maskable = torch.ones_like(x_0, dtype=torch.bool)
    if keep_first:
        maskable[:, 0] = False
    if documents is not None:
        maskable &= documents >= 0
    return maskable


def ar(model: Forward, x_0: Tensor, maskable: Tensor, layout: BlockLayout | None = None) -> Tensor:
    """Nats per token [B, L] of a causal model; 0 at position 0, which nothing predicts."""
    predicted = maskable.clone()
    predicted[:, 0] = False
    at = torch.zeros_like(predicted)
    at[:, :-1] = predicted[:, 1:]  # the logits at i are for token i + 1
    nll = model(x_0, at=at, targets=x_0[predicted], layout=layout).nll
    assert nll is not None
    return _place(nll, predicted)


def bd3lm(
    model: Forward,
    x_0: Tensor,
    draw: Draw,
    layout: BlockLayout | None = None,
    context: Context | None = None,
) -> Tensor:
    """The draw's estimate of the bound in nats per token [B, L].

    The R noised copies of each sequence read one pass over x_0, or the `context` given in its
    place. Only masked tokens go through the output layer.
    """
    masked = draw.masked
    targets = x_0.repeat(masked.shape[0] // x_0.shape[0], 1)[masked]
    nll = model(
        draw.x_t,
        x_0=x_0 if context is None else None,
        context=context,
        sigma=draw.sigma,
        at=masked,
        targets=targets,
        layout=layout,
    ).nll
    assert nll is not None
    weighted = _place(nll * draw.weight[masked], masked)
    return weighted.view(-1, *x_0.shape).sum(0)


def _place(values: Tensor, where: Tensor) -> Tensor:
    """values [P] at the True positions of `where`, 0 elsewhere."""
    return torch.zeros(where.shape, dtype=values.dtype, device=values.device).masked_scatter(
        where, values
    )
