"""Run by two processes: one step of a network sharded over them by FSDP2 against one alone.

Writes `same` into the file given, or fails.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from blockdiff import objectives
from blockdiff.estimators import make_estimator
from blockdiff.noising import stratified_noise
from blockdiff.training.ema import make_ema, update_ema
from helpers import random_tokens, tiny_model

ROWS = 4


def gradients_of(model: torch.nn.Module, rows: slice, core: torch.nn.Module) -> None:
    """The gradient of the mean over some of the batch's rows, masks drawn for the whole."""
    x_0 = random_tokens(core, ROWS, 16, seed=5)
    noise = stratified_noise(ROWS, core.config.layout, torch.Generator().manual_seed(3))
    maskable = objectives.maskable_positions(x_0)
    draw = make_estimator("exact_k")(
        x_0[rows], core.config.layout, noise.rows(rows.start, rows.stop), maskable[rows],
        core.config.mask_token_id,
    )  # fmt: skip
    nats = objectives.bd3lm(model, x_0[rows], draw)
    (nats.sum() / maskable[rows].sum()).backward()


def main(words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, count = distributed.get_rank(), distributed.get_world_size()
    assert count == 2
    alone = tiny_model(vocab_size=12, length=16, block_size=4)
    sharded = copy.deepcopy(alone)
    averages = make_ema(alone, 0.9), make_ema(sharded, 0.9)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (count,)), reshard_after_forward=False)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-1) for m in (alone, sharded)]
    for _ in range(2):
        gradients_of(alone, slice(0, ROWS), alone)
        gradients_of(sharded, slice(rank * ROWS // count, (rank + 1) * ROWS // count), sharded)
        for ours, theirs in zip(sharded.parameters(), alone.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, atol=1e-6, rtol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_ema(averages[0], alone)
        update_ema(averages[1], sharded)
    for ours, theirs in zip(averages[1].parameters(), averages[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    if rank == 0:
        Path(words[0]).write_text("same")
    distributed.destroy_process_group()
