"""Training losses and likelihood bounds: (model, x_0, draw) → nats per token [B, L].

    ar      −log p_θ(x^i | x^{<i})
    bd3lm   Σ_r weight_r · −log p_θ(x_0^ℓ | x_t^b, x_0^{<b}) at the masked tokens of Draw r

MDLM is `bd3lm` at L' = L. So is SEDD, whose network is fed σ and answers with scores in place of
probabilities: the model's own loss is then the score entropy (see `models.loss`), under the same
weights. No objective asks which estimator made its draw.

Each is an `Objective`, known by its name, which the model's configuration holds: trainer and
likelihood ask the object, and never which of them it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Context, DenoiserOutput
from blockdiff.noising import Draw
from blockdiff.registry import OBJECTIVES, register_objective

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


@dataclass(frozen=True)
class Objective:
    """What a model is trained by and measured with.

    Attributes:
        name: What it is chosen by; the model's configuration keeps it.
        nats: (model, x_0, what, layout, context) → nats per token [B, L], whose sum over the
            tokens that count is the loss. `what` is the `Draw` of x_0; without noise it is
            `maskable` bool [B, L], and there is no `context`.
        blocks: Which block sizes its models have: the one asked for ("any"), 1 ("one") or the
            context L ("whole").
        network: Fields of the network's configuration, for example {"causal": True}.
        noised: Whether it reads noised copies of the text. Without, its nats are the exact
            likelihood.
        bound: What measures such a model, if not `nats`: as that, and an upper bound on the
            negative log-likelihood whenever the draw is unbiased.

    Example:
        >>> import blockdiff
        >>> from blockdiff.objectives import bd3lm
        >>> blockdiff.Objective("mine", bd3lm, blocks="whole").block_size(1024, 4)
        1024
    """

    name: str
    nats: Callable[..., Tensor]
    blocks: Literal["any", "one", "whole"] = "any"
    network: Mapping[str, Any] = field(default_factory=dict)
    noised: bool = True
    bound: Callable[..., Tensor] | None = None

    @property
    def any_blocks(self) -> bool:
        return self.blocks == "any"

    def block_size(self, length: int, block_size: int) -> int:
        """L' of its models at context `length` where `block_size` was asked for."""
        return {"any": block_size, "one": 1, "whole": length}[self.blocks]

    def counted(self, x_0: Tensor, keep_first: bool, documents: Tensor | None = None) -> Tensor:
        """`maskable_positions`; without noise not position 0, which no token comes before."""
        return maskable_positions(x_0, keep_first or not self.noised, documents)


for _objective in (
    Objective("bd3lm", bd3lm),
    Objective("mdlm", bd3lm, "whole"),
    Objective("sedd", bd3lm, "whole", {"score": True, "time_conditioning": True}),
    Objective("ar", ar, "one", {"causal": True}, noised=False),
):
    register_objective(_objective)


def objective_of(config: Any) -> Objective:
    """The objective a model's configuration names."""
    return OBJECTIVES.find(config.objective)
