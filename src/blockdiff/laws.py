"""Objectives by name: what a model is trained by and measured with.

The model's configuration keeps the name. Trainer and likelihood look the `Objective` up and use its
attributes; neither has a branch for one of them. The functions are in `objectives.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor

from blockdiff.objectives import ar, bd3lm, maskable_positions
from blockdiff.registry import OBJECTIVES, register_objective


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
