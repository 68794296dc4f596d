"""The further parts of an objective's loss, on the validation windows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockdiff.models.denoiser import Denoiser
from blockdiff.noising import stratified_noise

if TYPE_CHECKING:
    from blockdiff.training.trainer import BlockDiffusionTrainer


@torch.no_grad()
def parts_of(
    trainer: BlockDiffusionTrainer, model: Denoiser, windows: dict[str, Tensor]
) -> dict[str, float]:
    """`eval_ar` and so on: means over what counts, in the run's largest blocks; {} without parts.

    Every process measures all windows.
    """
    found = dict.fromkeys(trainer.trained_by.parts, 0.0)
    if not found:
        return {}
    x_0, documents, run = windows["x_0"], windows.get("documents"), trainer.run
    counted = trainer.maskable(windows)
    generator = torch.Generator(x_0.device).manual_seed(run.seed)
    whole = model.config.layout_of(x_0.shape[1], max(run.block_sizes))
    for rows in torch.arange(len(x_0), device=x_0.device).split(run.batch_size):
        layout = whole if documents is None else replace(whole, documents=documents[rows])
        noise = stratified_noise(len(rows), layout, generator)
        mask = model.config.mask_token_id
        draw = trainer.estimator(x_0[rows], layout, noise, counted[rows], mask)
        parts = trainer.trained_by.nats(model, x_0[rows], draw, layout)
        assert isinstance(parts, dict)
        for name in found:
            found[name] += float(parts[name].sum())
    tokens = max(int(counted.sum()), 1)
    return {f"eval_{name}": total / tokens for name, total in found.items()}
