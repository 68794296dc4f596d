"""One job of the reproduction, in a worker process: what it needs is in the folder, what it finds
is written there as JSON, last and at once, so that an interrupted job is simply done again.

    OUT/data/{train,test}.jsonl   the split          OUT/models/NAME/    a training run
    OUT/tokenizer/                                   OUT/results/NAME.json
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from blockdiff.allocator import keep_freed_memory
from blockdiff.data.loading import load
from blockdiff.evaluation.corpus import open_sequences
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.evaluation.variance import DEFAULT_ESTIMATORS, variance
from blockdiff.reproduction.plan import Job, Scale
from blockdiff.training.callbacks import METRICS_FILE, read_metrics
from blockdiff.training.config import CONFIG_FILE, TrainConfig, load_config
from blockdiff.training.run import train


def begin_worker(threads: int) -> None:
    """A worker computes on its own core: two of them do more than one on two cores."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def work(folder: Path, scale: Scale, job: Job) -> None:
    """Does a job and writes its result."""
    begin = time.perf_counter()
    found = {"train": _train, "likelihood": _likelihood, "variance": _variance}[job.kind](
        folder, scale, job
    )
    record = {"job": job.record(), "seconds": time.perf_counter() - begin, **found}
    path = result_path(folder, job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def result_path(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name.replace('/', '.')}.json"


def _train(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    out = folder / "models" / job.name
    wish = dict(job.settings)
    start, total = wish.pop("continues", None), wish.pop("total", None)
    if start is not None and not (out / CONFIG_FILE).is_file():
        # The same run with more steps: whole or not at all.
        partial = out.with_name(f".{out.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folder / "models" / start, partial)
        partial.rename(out)
    if start is not None:
        config = replace(load_config(folder / "models" / start), out=str(out), steps=total)
    else:
        if "init_from" in wish:
            wish["init_from"] = str(folder / "models" / wish["init_from"])
        config = TrainConfig(
            out=str(out), data=str(folder / "data" / "train.jsonl"),
            validation_data=str(folder / "data" / "test.jsonl"),
            tokenizer=str(folder / "tokenizer"), bos=True, length=scale.length,
            preset=scale.preset, batch_size=scale.batch_size, lr=scale.lr, dropout=0.0,
            ema=scale.ema, eval_windows=32, eval_draws=1, log_every=25,
            save_every=scale.save_every, report_to="none", **wish,
        )  # fmt: skip
        if config.searches_clip:
            config = replace(config, eval_every=max(1, config.steps // scale.searches))
    resume = (out / CONFIG_FILE).is_file()
    done = train(replace(config, resume=resume), progress=False, device="cpu")
    return {
        "tokens": done.tokens_seen,
        "config": asdict(config),
        "metrics": read_metrics(out / METRICS_FILE),
    }


def _open(folder: Path, job: Job, windows: int) -> tuple[Any, torch.Tensor]:
    model, words = load(folder / "models" / job.settings["model"])
    data = str(folder / "data" / "test.jsonl")
    return model, open_sequences(model, words, data, windows=windows, bos=True)[1]["x_0"]


def _likelihood(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    model, x_0 = _open(folder, job, scale.test_windows)
    found = likelihood(model, x_0, draws=scale.draws)
    return {**found.record(), "nats": found.nats.tolist(), "tokens": found.tokens.tolist()}


def _variance(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    batches, rows, draws = scale.variance
    model, x_0 = _open(folder, job, batches * rows)
    size = job.settings["block_size"]
    found = [
        variance(model, x_0, name, block_size=size, batch_size=rows, draws=draws)
        for name in DEFAULT_ESTIMATORS
    ]
    return {"estimators": [x.record() for x in found]}
