"""Training losses and likelihood bounds: (model, x_0, draw) → nats per token [B, L].

    ar      −log p_θ(x^i | x^{<i})
    bd3lm   Σ_r weight_r · −log p_θ(x_0^ℓ | x_t^b, x_0^{<b}) at the masked tokens of copy r

MDLM is `bd3lm` with one block, L' = L. So is SEDD, whose network reads σ and gives scores in place
of probabilities: its loss at a masked token is the score entropy (`models.loss`), under the same
weights. `drafting.py` has two more. No objective depends on which estimator made the draw.

An `Objective` has a name, which the model's configuration keeps. Trainer and likelihood look it up
and use its attributes; neither has a branch for one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

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


@dataclass(frozen=True)
class Objective:
    """What a model is trained by and measured with.

    Attributes:
        name: What it is chosen by; the model's configuration keeps it.
        nats: (model, x_0, draw, layout, context) → nats per token [B, L]; the loss is their mean
            over the tokens that count. Where `noised` is false it is (model, x_0, maskable,
            layout) with `maskable` bool [B, L], and the nats are the exact likelihood. A loss of
            several parts gives a dict of them, that of the masked tokens first.
        blocks: Which block sizes its models have: the one asked for ("any"), 1 ("one") or the
            context L ("whole").
        network: Fields of the network's configuration, for example {"causal": True}.
        noised: Whether it reads noised copies of the text.
        bound: The function a likelihood is measured with, `nats` by default. It takes and gives the
            same and, whenever the draw is unbiased, is an upper bound on −log p in expectation.
        masks: Whether copies are what the run's estimator draws, or all that may be is masked.
        parts: The further parts of the loss, and their weights; 0 is for what is only watched.
        trains: Which parameters of an existing model it trains, by their names; it leaves
            everything else of that model as it is. All, where left out.

    Example:
        >>> import blockdiff
        >>> from blockdiff.objectives import bd3lm
        >>> blockdiff.Objective("mine", bd3lm, blocks="whole").block_size(1024, 4)
        1024
    """

    name: str
    nats: Callable[..., Tensor | dict[str, Tensor]]
    blocks: Literal["any", "one", "whole"] = "any"
    network: Mapping[str, Any] = field(default_factory=dict)
    noised: bool = True
    bound: Callable[..., Tensor] | None = None
    masks: Literal["drawn", "all"] = "drawn"
    parts: Mapping[str, float] = field(default_factory=dict)
    trains: Callable[[str], bool] | None = None

    @property
    def any_blocks(self) -> bool:
        return self.blocks == "any"

    @property
    def shifts(self) -> bool:
        """Whether its clean stream predicts tokens, and so is trained as blocks of 1."""
        return self.network.get("prediction") == "shift"

    @property
    def measure(self) -> Callable[..., Tensor]:
        """What a likelihood is measured with."""
        return cast("Callable[..., Tensor]", self.bound or self.nats)

    def drawn(self, *given: Any) -> Tensor:
        """The first part of the loss `nats(*given)`: the one that hangs on the masks."""
        found = self.nats(*given)
        return found if isinstance(found, Tensor) else next(iter(found.values()))

    def block_size(self, length: int, block_size: int) -> int:
        """L' of its models at context `length` where `block_size` was asked for."""
        return {"any": block_size, "one": 1, "whole": length}[self.blocks]

    def counted(self, x_0: Tensor, keep_first: bool, documents: Tensor | None = None) -> Tensor:
        """`maskable_positions`; for AR never position 0, which no token comes before."""
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
