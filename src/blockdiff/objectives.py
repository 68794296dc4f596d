"""Training losses and likelihood bounds: (model, x_0, draw) → nats per token [B, L].

    ar      −log p_θ(x^i | x^{<i})
    bd3lm   Σ_r weight_r · −log p_θ(x_0^ℓ | x_t^b, x_0^{<b}) at the masked tokens of copy r

MDLM is `bd3lm` with one block, L' = L. So is SEDD, whose network reads σ and gives scores in place
of probabilities: its loss at a masked token is the score entropy (`models.loss`), under the same
weights. `drafting.py` has two more, and `laws.py` the names of all. No objective depends on which
estimator made the draw.
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
    """bool [B, L]: the tokens that may be masked. Not padding, nor position 0 if it is kept clean.

    `documents` int64 [B, L]: the document of each token, negative at padding.
    """
    maskable = torch.ones_like(x_0, dtype=torch.bool)
    if keep_first:
        maskable[:, 0] = False
    if documents is not None:
        maskable &= documents >= 0
    return maskable


def ar(model: Forward, x_0: Tensor, maskable: Tensor, layout: BlockLayout | None = None) -> Tensor:
    """Nats per token [B, L] of a causal model; 0 at position 0, which no token comes before."""
    predicted = maskable.clone()
    predicted[:, 0] = False
    at = torch.zeros_like(predicted)
    at[:, :-1] = predicted[:, 1:]  # the logits at i are for token i + 1
    return place(model(x_0, at=at, targets=x_0[predicted], layout=layout).nll, predicted)


def bd3lm(
    model: Forward,
    x_0: Tensor,
    draw: Draw,
    layout: BlockLayout | None = None,
    context: Context | None = None,
) -> Tensor:
    """The draw's estimate of the bound in nats per token [B, L], from x_0 [B, L].

    The R noised copies of a sequence share one pass over its clean tokens; `context`, what
    `model.encode(x_0)` gave, takes its place. Only masked tokens go through the output layer.
    """
    masked = draw.masked
    targets = x_0.repeat(len(masked) // len(x_0), 1)[masked]
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
    return place(nll * draw.weight[masked], masked).view(-1, *x_0.shape).sum(0)


def place(values: Tensor | None, where: Tensor) -> Tensor:
    """values [P] at the True positions of `where`, 0 elsewhere."""
    assert values is not None
    return values.new_zeros(where.shape).masked_scatter(where, values)
