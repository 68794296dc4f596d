"""What happens beside the steps of a run: its average, its end, metrics.jsonl, a progress bar."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback

from blockdiff.outputs import to_json, write_text
from blockdiff.training import parallel
from blockdiff.training.arguments import reporters
from blockdiff.training.config import TrainConfig

if TYPE_CHECKING:
    from blockdiff.training.base import RunTrainer

Logs = dict[str, float] | None
METRICS_FILE = "metrics.jsonl"


class Bookkeeping(TrainerCallback):
    """Updates the average after each step, logs before each checkpoint, and ends the run."""

    def __init__(self, trainer: RunTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        trainer = self.trainer
        if trainer.ema is not None:
            trainer.ema.n_averaged.fill_(trainer.ema_updates + state.global_step)
            network = trainer.accelerator.unwrap_model(trainer.model)
            parallel.shard_like(trainer.ema.module, network)
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        trainer = self.trainer
        if trainer.ema is not None:
            trainer.ema.update_parameters(trainer.accelerator.unwrap_model(trainer.model))
        minutes = trainer.run.minutes
        if minutes and time.perf_counter() - self.begin > 60 * minutes:
            control.should_training_stop = control.should_save = True
        # To ask another device than the CPU is to wait for it: there only at a log or a checkpoint.
        if args.device.type == "cpu" or control.should_log or control.should_save:
            trainer.require_finite_loss()
            if trainer.received_signal():
                control.should_training_stop = control.should_save = True
        if control.should_save:
            # A log line averages since the one before; ending it here makes a resumed run's
            # lines equal to an uninterrupted one's.
            control.should_log = True


class _TensorBoard(TensorBoardCallback):
    """Stays open after the last step: the last validation belongs to the same folder."""

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        if self.tb_writer is not None:
            self.tb_writer.flush()


def tensorboard(config: TrainConfig) -> list[TrainerCallback]:
    """Event files in the run's own folder; transformers would put them among the checkpoints."""
    if "tensorboard" not in reporters(config):
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [_TensorBoard(SummaryWriter(str(Path(config.out) / "tensorboard")))]


class MetricsLog(TrainerCallback):
    """One JSON line a log event: step, tokens seen, loss (nats per token), tokens per second.

    Where the run has several block sizes, also the loss of each that had a step: loss_4, ….
    """

    def __init__(self, folder: Path, tokens_per_step: int) -> None:
        self.path = folder / METRICS_FILE
        self.tokens_per_step = tokens_per_step

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        self._clock = (time.perf_counter(), state.global_step)
        if state.is_world_process_zero:
            # What an interrupted run logged past its last checkpoint will be logged again.
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            text = "".join(to_json(line) + "\n" for line in kept)
            write_text(self.path, text)

    def on_log(
        self, args: Any, state: TrainerState, *more: Any, logs: Logs = None, **kw: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        tokens = state.global_step * self.tokens_per_step
        line: dict[str, float] = {"step": state.global_step, "tokens": tokens}
        now = time.perf_counter()
        since, step = self._clock
        if "loss" in logs and state.global_step > step:
            elapsed = (now - since) / (state.global_step - step)
            line["tokens_per_second"] = round(self.tokens_per_step / elapsed, 1)
            self._clock = (now, state.global_step)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json({**line, **logs}) + "\n")

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        self._clock = (time.perf_counter(), state.global_step)  # validation is not training time


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


class ProgressBar(TrainerCallback):
    """Loss, speed and time left on standard error: a bar on a terminal, elsewhere a line a log."""

    def __init__(self, title: str, tokens_per_step: int) -> None:
        self.title, self.tokens_per_step = title, tokens_per_step
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        if state.is_world_process_zero:
            if self.bar.console.is_terminal:
                self.bar.start()
            self.task = self.bar.add_task(
                self.title, total=state.max_steps, completed=state.global_step, status=""
            )
            self.begin = (time.perf_counter(), state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        if state.is_world_process_zero:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, *more: Any, logs: Logs = None, **kw: Any
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            since, step = self.begin
            tokens = (state.global_step - step) * self.tokens_per_step
            speed = tokens / max(time.perf_counter() - since, 1e-9)
            each = ", ".join(
                name.replace("loss_", "L' ").replace("part_", "") + f": {own:.3f}"
                for name, own in logs.items()
                if name.startswith(("loss_", "part_"))
            )
            losses = f" ({each})" if each else ""
            status = f"loss {logs['loss']:.3f} nats{losses} · {speed:,.0f} tokens/s"
            self.bar.update(self.task, status=status)
            if not self.bar.console.is_terminal:
                left = (state.max_steps - state.global_step) * self.tokens_per_step / speed
                print(
                    f"step {state.global_step}/{state.max_steps} · {status} · "
                    f"{timedelta(seconds=round(left))} left",
                    file=sys.stderr,
                    flush=True,
                )

    def stop(self) -> None:
        self.bar.stop()
