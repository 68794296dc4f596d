"""Run by two processes: steps of a network sharded by FSDP2 over two processes against one alone.

Writes `same` into the file given, or fails.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from blockdiff import objectives
from blockdiff.estimators import make_estimator
from blockdiff.noising import stratified_noise
from blockdiff.training.config import TrainConfig
from blockdiff.training.ema import make_ema
from blockdiff.training.parallel import (
    gathered,
    mixed_precision,
    recompute_activations,
    shard_layers,
    shard_like,
)
from blockdiff.training.run import train
from blockdiff.training.trainer import BlockDiffusionTrainer
from helpers import random_tokens, tiny_model

ROWS = 4
RECIPE = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml"


def loss_of(model, rows: slice, core, estimator: str) -> torch.Tensor:
    """The mean over some of the batch's rows, masks drawn for the whole."""
    x_0 = random_tokens(core, ROWS, 16, seed=5)
    maskable = objectives.maskable_positions(x_0)
    if core.config.causal:
        nats = objectives.ar(model, x_0[rows], maskable[rows])
    else:
        layout = core.config.layout
        noise = stratified_noise(ROWS, layout, torch.Generator().manual_seed(3))
        noise = noise.rows(rows.start, rows.stop)
        mask = core.config.mask_token_id
        draw = make_estimator(estimator)(x_0[rows], layout, noise, maskable[rows], mask)
        nats = objectives.bd3lm(model, x_0[rows], draw)
    return nats.sum() / maskable[rows].sum()


def by_recipe(model, mesh) -> None:
    """As `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` does."""
    given = {
        name.removeprefix("fsdp_"): value
        for name, value in yaml.safe_load(RECIPE.read_text())["fsdp_config"].items()
    }
    given["fsdp_version"] = given.pop("version")
    given["transformer_cls_names_to_wrap"] = given.pop("transformer_layer_cls_to_wrap").split(",")
    plugin = FullyShardedDataParallelPlugin(**given, cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True,
        torch_device_mesh={("all",): mesh}, device=torch.device("cpu"),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("all",)),
    )  # fmt: skip
    fsdp2_prepare_model(accelerator, model)


def compare(
    mesh, shard, estimator: str = "exact_k", again: bool = False, atol: float = 1e-6, **settings
) -> None:
    """Two steps: losses, gradients and averages, sharded and alone.

    `again`: activations are computed again. `atol`: of gradients.
    """
    rank, count = distributed.get_rank(), distributed.get_world_size()
    alone = tiny_model(vocab_size=12, length=16, block_size=4, **settings)
    sharded = copy.deepcopy(alone)
    averages = make_ema(alone, 0.9), make_ema(sharded, 0.9)
    shard(sharded, mesh)
    layers = list(sharded.layers)
    assert all(isinstance(unit, FSDPModule) for unit in [sharded, *layers])
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    shard_like(averages[1].module, sharded)
    if again:
        recompute_activations(sharded)
        sharded.train()  # dropout is 0
        assert all(layer.gradient_checkpointing for layer in layers)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-1) for m in (alone, sharded)]
    for _ in range(2):
        expected = loss_of(alone, slice(0, ROWS), alone, estimator)
        own = slice(rank * ROWS // count, (rank + 1) * ROWS // count)
        found = loss_of(sharded, own, sharded, estimator)
        expected.backward()
        found.backward()
        total = found.detach().clone()
        distributed.all_reduce(total)
        torch.testing.assert_close(total / count, expected.detach(), atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, atol=atol, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        averages[0].update_parameters(alone)
        averages[1].update_parameters(sharded)
    part = averages[1].module
    held = sum(p.to_local().numel() for p in part.parameters())
    assert held < 0.6 * sum(p.numel() for p in alone.parameters()), "a half of the average"
    with gathered(part):
        assert not any(isinstance(p, DTensor) for p in part.parameters())
        for ours, theirs in zip(part.parameters(), averages[0].module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    assert all(isinstance(p, DTensor) for p in part.parameters())


def compare_bf16(mesh) -> None:
    """bf16 weights are gathered, but residual stream, loss and gradients stay float32."""
    alone = tiny_model(vocab_size=12, length=16, block_size=4)
    sharded = copy.deepcopy(alone)
    shard_layers(sharded, mesh, bf16=True)
    streams = []
    sharded.layers[1].register_forward_hook(lambda m, args, out: streams.append(out.dtype))
    exact = loss_of(alone, slice(0, ROWS), alone, "exact_k")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss_of(sharded, slice(0, ROWS), sharded, "exact_k")
    rounded.backward()
    assert streams == [torch.float32] and rounded.dtype == torch.float32
    assert 0 < abs(rounded - exact) < 0.01 * exact
    assert {p.grad.dtype for p in sharded.parameters()} == {torch.float32}


class ShardedTrainer(BlockDiffusionTrainer):
    """A run sharded over CPU processes, as accelerate shards one over accelerators."""

    def create_optimizer(self, *given: object, **named: object):
        shard_layers(self.model, init_device_mesh("cpu", (distributed.get_world_size(),)))
        self.accelerator.prepare_model = lambda model, **named: model
        return super().create_optimizer(*given, **named)

    def _save_checkpoint(self, *unused: object) -> None:
        """Accelerate's affair."""


def run(words: Sequence[str]) -> None:
    """A whole run, from text to model folder; `words` is its configuration as JSON."""
    torch.set_num_threads(1)
    train(TrainConfig(**json.loads(words[0])), progress=False, trainer_class=ShardedTrainer)


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    assert mesh.size() == 2
    for shard in (shard_layers, by_recipe):
        compare(mesh, shard)
        compare(mesh, shard, "paired")  # two copies share an encoded clean stream
        compare(mesh, shard, again=True)
    compare(mesh, shard_layers, "paired", again=True)
    compare(mesh, shard_layers, time_conditioning=True)
    compare(mesh, shard_layers, causal=True, atol=3e-6)
    compare_bf16(mesh)
    assert mixed_precision(False).param_dtype is None
    if distributed.get_rank() == 0:
        Path(words[0]).write_text("same")
    distributed.destroy_process_group()
