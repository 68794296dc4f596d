"""`blockdiff demo`: the whole house in a few minutes, on the machine's own Python documentation.

An AR model first, then a BD3-LM (L' = 4) that starts from its weights: a mask token must learn to
look one position back, which AR training has taught the network already. Both perplexities, three
passages, a plot, a page that replays one passage's denoising, and a report.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)

from blockdiff import checks, folders
from blockdiff.api import TextGeneration, encode_prompts, to_text
from blockdiff.device import choose_device
from blockdiff.evaluation.corpus import evaluate_corpus
from blockdiff.evaluation.options import EvaluateOptions
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.loading import load
from blockdiff.outputs import to_json, write_text
from blockdiff.plots import loss_plot
from blockdiff.printing import make_table, markdown_table, plain_console, printable
from blockdiff.replay import Recorder, write_page
from blockdiff.sampling.generate import collect, stream_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.training.callbacks import METRICS_FILE, read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import Trained, train
from blockdiff.training.trainer import BlockDiffusionTrainer

Clock = Callable[[], float]

# The recipe both models share; docs/performance.md tells what else was tried.
RECIPE = TrainConfig(
    data="pydoc",
    vocab_size=1024,
    length=128,
    block_size=4,
    preset="nano",
    batch_size=16,
    lr=3e-3,
    warmup=30,
    dropout=0.0,
    ema=0.99,
    log_every=10,
    eval_windows=16,  # a glance; the comparison below measures more
    save_every=10_000,
    report_to="none",
)
# Steps where time allows, and the share of the time that goes to AR. The learning rate falls to
# nothing by the end of either (`PacedTrainer`).
MOST_STEPS = {"ar": 700, "bd3lm": 2000}
AR_SHARE = 0.35
# Minutes kept for what comes after training: measuring, writing.
MINUTES_AFTER = 0.9
MEASURED_WINDOWS = 192
PROMPTS = ("", "This module provides", "Return the")
# So small a model says more at a low temperature.
SAMPLING = SamplingOptions(max_new_tokens=96, temperature=0.6, seed=1)


@dataclass(frozen=True)
class _Result:
    """One model of the demo: its run, its likelihood record and the steps it was given."""

    name: str
    run: Trained
    record: dict[str, object]
    tokens_before: int = 0

    def row(self) -> tuple[str, str, str, str]:
        bound = "" if self.record["kind"] == "ar" else "≤ "
        return (
            self.name,
            f"{bound}{self.record['perplexity']:.2f} ± {self.record['perplexity_stderr']:.2f}",
            f"{bound}{self.record['bits_per_byte']:.3f}",
            f"{self.run.tokens_seen:,}"
            + (f" + {self.tokens_before:,} as AR" if self.tokens_before else ""),
        )


def demo(
    out: str,
    minutes: float = 8.0,
    seed: int = 0,
    overwrite: bool = False,
    device: str = "auto",
    clock: Clock = time.perf_counter,
) -> None:
    """Runs the demo and leaves models, metrics, report, plot and page in `out`.

    Raises `InputError` when `out` holds something already or cannot be written, or `minutes` is
    not positive. `overwrite` replaces a demo, or a run, that is there.
    """
    checks.numbers(minutes=minutes, seed=seed)
    recipe = replace(RECIPE, seed=seed, device=device)
    with folders.claim(out, overwrite=overwrite, kinds=("demo", "run", "reproduction")) as folder:
        folders.clear(folder)
        _demo(folder, minutes, recipe, clock)


def _demo(folder: Path, minutes: float, recipe: TrainConfig, clock: Clock) -> None:
    """The demo in a folder that is claimed and cleared."""
    begin = clock()
    console = plain_console()

    def run(kind: str, share: float, config: TrainConfig) -> Trained:
        """Trains for a share of the time that is left, at least a tenth of all of it."""
        left = 60 * max(minutes - MINUTES_AFTER, 0.8 * minutes) - (clock() - begin)
        pace = Pace(max(share * left, 6 * minutes), clock)
        named = replace(config, steps=MOST_STEPS[kind])
        done = train(named, trainer_class=partial(PacedTrainer, pace=pace))
        console.print(f"  {_steps(done)} steps in {done.seconds:.0f} s")
        return done

    ar_folder, bd_folder = folder / "ar", folder / "bd3lm"
    console.print("1 AR, on the Python documentation of this machine", style="bold")
    ar = run("ar", AR_SHARE, replace(recipe, objective="ar", out=str(ar_folder)))
    console.print("2 BD3-LM, L' = 4, from the AR weights", style="bold")
    bd = run("bd3lm", 1.0, replace(recipe, out=str(bd_folder), init_from=str(ar_folder)))
    console.print("3 Perplexity of documents neither has seen", style="bold")
    results = [
        _Result("AR", ar, _measure(ar_folder, recipe)),
        _Result("BD3-LM L' = 4", bd, _measure(bd_folder, recipe), ar.tokens_seen),
    ]
    head = ("model", "perplexity ± s.e.", "bits per byte", "tokens seen")
    console.print(make_table(head, [result.row() for result in results]))
    console.print("4 Three passages, block by block", style="bold")
    model, tokenizer = load(bd_folder, device=choose_device(recipe.device))
    texts = _write(model, tokenizer, folder / "denoising.html")
    for prompt, text in zip(PROMPTS, texts.texts, strict=True):
        console.print()
        console.print(prompt, style="bold", end="")
        console.print(printable(text))
    _gather_metrics(folder, results)
    seconds = clock() - begin
    write_text(folder / "report.md", _report(results, texts, seconds, recipe.seed))
    console.print(
        f"\n{seconds / 60:.1f} minutes. In {folder}: bd3lm/ (the model), report.md, loss.png, "
        "metrics.jsonl, and denoising.html to open in a browser."
    )


class Pace:
    """A training's share of the time, and how far it is: by its steps or the clock, what is later.

    Nothing is planned from a few timed steps, so a disturbed moment costs no more than itself.
    """

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.seconds, self.clock = seconds, clock
        self.begin: float | None = None

    def progress(self, step: int, steps: int) -> float:
        """0 at the first call to 1, when `steps` are done or the time is over."""
        if self.begin is None:
            self.begin = self.clock()
        return min(1.0, max(step / steps, (self.clock() - self.begin) / self.seconds))


class PacedTrainer(BlockDiffusionTrainer):
    """Ends when `pace` is over, by when the learning rate has fallen to nothing."""

    def __init__(self, *given: Any, pace: Pace, **named: Any) -> None:
        self.pace = pace
        super().__init__(*given, **named)
        self.add_callback(_EndOfPace(pace))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        warmup = max(1, self.args.warmup_steps)

        def share(step: int) -> float:
            progress = self.pace.progress(step, num_training_steps)
            return min(1.0, (step + 1) / warmup) * (1 - progress)

        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, share)
        return self.lr_scheduler


class _EndOfPace(TrainerCallback):
    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        if self.pace.progress(state.global_step, state.max_steps) >= 1:
            control.should_training_stop = True


def _measure(folder: Path, recipe: TrainConfig) -> dict[str, object]:
    wish = EvaluateOptions(
        recipe.data, part="validation", validation_fraction=recipe.validation_fraction,
        split_seed=recipe.seed, windows=MEASURED_WINDOWS,
    )  # fmt: skip
    return evaluate_corpus(folder, wish, recipe.device)


def _steps(run: Trained) -> int:
    return run.tokens_seen // (RECIPE.batch_size * RECIPE.length)


def _write(model: Denoiser, tokenizer: PreTrainedTokenizerBase, page: Path) -> TextGeneration:
    """The passages; the last one's denoising becomes the page."""
    ids = encode_prompts(model, list(PROMPTS), tokenizer)
    shown = len(ids) - 1
    recorder = Recorder(tokenizer, len(ids[shown]), model.config.block_size, row=shown)

    begin = time.perf_counter()
    *_, last = recorder.follow(stream_tokens(model, ids, SAMPLING))
    seconds = time.perf_counter() - begin
    done = collect(last, ids, model.config.eos_token_id, SAMPLING.max_new_tokens, seconds)
    write_page(
        recorder.recording(),
        page,
        title="Block diffusion, step by step",
        subtitle="A small BD3-LM (L' = 4) trained for minutes on the Python documentation.",
    )
    return to_text(done, ids, tokenizer)


def _gather_metrics(folder: Path, results: list[_Result]) -> None:
    """One metrics.jsonl and one plot for both models."""
    curves = {result.name: read_metrics(result.run.folder / METRICS_FILE) for result in results}
    records = [{"model": name, **line} for name, lines in curves.items() for line in lines]
    records += [{"model": result.name, "final": result.record} for result in results]
    write_text(folder / METRICS_FILE, "".join(to_json(record) + "\n" for record in records))
    loss_plot(curves, folder / "loss.png", title="Training on pydoc, nats per token")


def _report(results: list[_Result], texts: TextGeneration, seconds: float, seed: int) -> str:
    head = ("model", "perplexity per token", "bits per byte", "tokens seen", "steps", "training")
    rows = [
        (*result.row(), str(_steps(result.run)), f"{result.run.seconds:.0f} s")
        for result in results
    ]
    record = results[0].record
    lines = [
        "# blockdiff demo",
        "",
        f"Trained and measured in {seconds / 60:.1f} minutes on {os.cpu_count()} cores "
        f"({platform.machine()}, torch {torch.__version__}), seed {seed}: the `{RECIPE.preset}` "
        f"network, a BPE of {RECIPE.vocab_size} tokens, context {RECIPE.length}, on `pydoc`.",
        "",
        markdown_table(head, rows),
        "",
        f"Measured on {record['sequences']} windows of documents held out of training; ± is one "
        "standard error over windows. The BD3-LM's figure is its bound, exact over masks "
        "(all 15 masks of a block), and it starts from the AR weights, so it has seen the AR "
        "model's tokens as well as its own.",
        "",
        "![loss](loss.png)",
        "",
        "## Three passages (first-hitting, "
        f"temperature {SAMPLING.temperature}, seed {SAMPLING.seed})",
    ]
    for prompt, text, new, nfe in zip(PROMPTS, texts.texts, texts.tokens, texts.nfe, strict=True):
        cost = f"{len(new)} tokens in {nfe} network evaluations ({len(new) / nfe:.2f} each):"
        lines += ["", cost, "", "```text", f"{prompt}{text}", "```"]
    lines += ["", "`denoising.html` replays the last one step by step.", ""]
    return "\n".join(lines)
