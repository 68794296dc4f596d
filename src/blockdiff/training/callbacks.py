"""What one sees of a run: metrics.jsonl and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState

from blockdiff.outputs import to_json, write_text

Logs = dict[str, float] | None
METRICS_FILE = "metrics.jsonl"


class MetricsLog(TrainerCallback):
    """One JSON line a log event: step, tokens seen, loss (nats per token), tokens per second."""

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
            status = f"loss {logs['loss']:.3f} nats · {speed:,.0f} tokens/s"
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
