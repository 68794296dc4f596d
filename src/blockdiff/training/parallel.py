"""How a network is spread over devices and time: DDP, FSDP2, compilation, recomputation, TF32.

    DDP        every process has all weights; gradients are averaged (accelerate's default)
    FSDP2      weights, gradients, optimizer and average are sharded, gathered a layer at a time
    compile    each layer around its attention
    recompute  each layer's activations are not kept, but computed again in the backward

The first two come from `accelerate launch` (recipes/accelerate), or from `shard_layers` in a loop
of one's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from blockdiff.models.passes import recomputed

# transformers' arguments: every weight gets a gradient in every step
ARGUMENTS: dict[str, Any] = {"ddp_find_unused_parameters": False}


def recompute_activations(model: nn.Module) -> None:
    """Makes each layer keep its input only, and run its forward again in the backward.

    transformers has a method for it, but its versions do not agree on the name.
    """
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            layer: Any = module
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(
                checkpoint, use_reentrant=False, context_fn=recomputed
            )


def allow_tf32(bf16: bool, device: torch.device) -> None:
    """Lets what stays float32 in a bf16 run, such as products outside autocast, use TF32 on CUDA.

    TF32 keeps 10 bits of a float32's 23, bf16 7: such a run is no more exact than that anyway. A
    float32 run keeps all of them. What it gains was not measured.
    """
    if device.type == "cuda" and bf16:
        torch.set_float32_matmul_precision("high")


def mixed_precision(bf16: bool) -> MixedPrecisionPolicy:
    """For a sharded run: bf16 weights are gathered; gradients are added up in float32.

    The residual stream and the loss stay float32, as in a run that is not sharded: by default every
    layer's input and output would be rounded to bf16.
    """
    if not bf16:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def shard_layers(
    model: PreTrainedModel, mesh: DeviceMesh | None = None, bf16: bool = False
) -> None:
    """Shards a network over the processes of `mesh` (all of them) in place: FSDP2, by layer.

    As accelerate does under recipes/accelerate/fsdp2.yaml. Call its `forward`, not `encode`, which
    gathers nothing by itself.
    """
    policy = mixed_precision(bf16)
    units = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]
    for layer in units:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def shard_like(module: nn.Module, model: nn.Module) -> None:
    """Shards a whole copy of a model's weights as the model's own are; nothing where they are not.

    Every process gets its part of what the first one has; all must call together.
    """
    for name, like in model.named_parameters():
        own = module.get_parameter(name)
        if isinstance(like, DTensor) and not isinstance(own, DTensor):
            _set(module, name, distribute_tensor(own.data, like.device_mesh, like.placements))


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While entered, every process has every weight of a sharded `module` whole.

    For measuring and saving; all processes must enter together. A module that is not sharded stays
    as it is.
    """
    parts = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    for name, part in parts.items():
        _set(module, name, part.full_tensor())
    try:
        yield
    finally:
        for name, part in parts.items():
            _set(module, name, part)


def _set(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, nn.Parameter(tensor, requires_grad=False))
