"""What a resumed run needs beside its last checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, get_scheduler

from blockdiff.outputs import to_json, write_text
from blockdiff.training.blocks import block_size_of
from blockdiff.training.callbacks import MetricsLog, read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.trainer import BlockDiffusionTrainer


def restore(trainer: BlockDiffusionTrainer, checkpoint: Path, log: MetricsLog) -> None:
    """Loads the state of a run that made all its steps, but was stopped before it was saved.

    transformers' own loop would make one more step before it compares their number.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer.state.is_world_process_zero = trainer.is_world_process_zero()
    if trainer.run.searches_clip and trainer.clip is not None:
        trainer.averaged_model.config.clip = list(trainer.clip)
    log.on_train_begin(trainer.args, trainer.state, trainer.control)
    if trainer.is_world_process_zero() and last_validation(trainer) is None:
        # The last validation may have been logged just before the kill; it will be logged again.
        lines = [
            line
            for line in read_metrics(log.path)
            if line["step"] < trainer.state.global_step or "eval_perplexity" not in line
        ]
        write_text(log.path, "".join(to_json(line) + "\n" for line in lines))


def last_validation(trainer: BlockDiffusionTrainer) -> dict[str, float] | None:
    """The validation of the weights as they are now, where one was made after the last step."""
    for line in reversed(trainer.state.log_history):
        if line.get("step") == trainer.state.global_step and "eval_perplexity" in line:
            names = ("eval_", "clip_")
            return {name: value for name, value in line.items() if name.startswith(names)}
    return None


def announce_rate(stored: TrainConfig, config: TrainConfig, done: int) -> None:
    """A line on standard error where another number of steps moves learning rate or block size."""
    sizes = [block_size_of(options, min(done, options.steps - 1)) for options in (stored, config)]
    if config.grow and sizes[0] != sizes[1]:
        print(
            f"blockdiff: the block size goes from {sizes[0]} to {sizes[1]} at step {done}: it was "
            f"to grow for {stored.steps} steps and now does for {config.steps}",
            file=sys.stderr,
        )
    if config.lr_schedule == "constant":
        return
    old, new = (_rate(options, done) for options in (stored, config))
    print(
        f"blockdiff: the learning rate goes from {old:.3g} to {new:.3g} at step {done}: its "
        f"{config.lr_schedule} decay was to end at step {stored.steps} and now ends at "
        f"{config.steps}",
        file=sys.stderr,
    )


def _rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
    schedule: Any = get_scheduler(config.lr_schedule, optimizer, config.warmup, config.steps)
    return float(config.lr * schedule.lr_lambdas[0](step))
