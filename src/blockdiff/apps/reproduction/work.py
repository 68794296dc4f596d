"""One job of the reproduction, in a worker process: what it needs is in the folder, what it finds
is written there as JSON, last and at once, so that an interrupted job is simply done again.

    OUT/data/{train,test}.jsonl   the split          OUT/models/NAME/    a training run
    OUT/tokenizer/                                   OUT/results/NAME.json
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockdiff.allocator import keep_freed_memory
from blockdiff.api import generate
from blockdiff.apps.reproduction.control import HalfCounted
from blockdiff.apps.reproduction.plan import Job, Scale
from blockdiff.data.packing import pack
from blockdiff.data.windows import stack
from blockdiff.evaluation.corpus import open_documents, open_sequences
from blockdiff.evaluation.judge import load_judge
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.evaluation.samples import sample_quality, shuffled
from blockdiff.evaluation.variance import DEFAULT_ESTIMATORS, variance
from blockdiff.models.loading import load
from blockdiff.outputs import to_json, write_text
from blockdiff.sampling.options import SamplingOptions
from blockdiff.training.callbacks import METRICS_FILE, read_metrics
from blockdiff.training.checkpoints import checkpoint_step, newest_checkpoint
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train
from blockdiff.training.stored import CONFIG_FILE, load_config
from blockdiff.training.trainer import BlockDiffusionTrainer


def begin_worker(threads: int) -> None:
    """A worker computes on its own core: two of them do more than one on two cores."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    gc.freeze()  # each training ends in a collection: 0.2 s over all that imports left
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def work(folder: Path, scale: Scale, job: Job, commit: str) -> None:
    """Does a job and writes its result, which names the commit of the code."""
    begin, busy = time.perf_counter(), time.process_time()
    kinds = {
        "train": _train, "likelihood": _likelihood, "variance": _variance,
        "samples": _samples, "real": _real,
    }  # fmt: skip
    found = kinds[job.kind](folder, scale, job)
    # Of a training that was interrupted, the steps before count as those since.
    whole = found.pop("whole", 1.0)
    record = {
        "job": job.record(),
        "seconds": time.perf_counter() - begin,
        # What else the machine does meanwhile does not count.
        "processor_seconds": (time.process_time() - busy) * whole,
        "commit": commit,
        **found,
    }
    path = result_path(folder, job.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(record, indent=1) + "\n")


def result_path(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name.replace('/', '.')}.json"


def _train(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    out = folder / "models" / job.name
    wish = dict(job.settings)
    start, total = wish.pop("continues", None), wish.pop("total", None)
    trainer = HalfCounted if wish.pop("half_counted", False) else BlockDiffusionTrainer
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
            ema=scale.ema, eval_windows=min(32, scale.test_windows), eval_draws=1, log_every=25,
            save_every=scale.save_every, report_to="none", **wish,
        )  # fmt: skip
        if config.searches_clip:
            config = replace(config, eval_every=max(1, config.steps // scale.searches))
    resume = (out / CONFIG_FILE).is_file()
    newest = newest_checkpoint(out)
    left = config.steps - (checkpoint_step(newest) if newest else 0)
    done = train(
        replace(config, resume=resume), progress=False, device="cpu", trainer_class=trainer
    )
    return {
        "whole": job.settings["steps"] / left if left > 0 else 1.0,
        "tokens": done.tokens_seen,
        "config": asdict(config),
        "metrics": read_metrics(out / METRICS_FILE),
    }


def _open(folder: Path, job: Job, windows: int) -> tuple[Any, torch.Tensor]:
    model, words = load(folder / "models" / job.settings["model"], device="cpu")
    data = str(folder / "data" / "test.jsonl")
    return model, open_sequences(model, words, data, windows=windows, bos=True)[1]["x_0"]


def _likelihood(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    model, x_0 = _open(folder, job, scale.test_windows)
    found = likelihood(model, x_0, draws=scale.draws)
    return {**found.record(), "nats": found.nats.tolist(), "tokens": found.tokens.tolist()}


def _samples(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    """Texts of a model, from the beginning-of-text token, and how good they are."""
    model, words = load(folder / "models" / job.settings["model"], device="cpu")
    options = SamplingOptions(**job.settings["options"])
    done = generate(model, tokenizer=words, samples=scale.samples, options=options)
    lengths = [len(row) for row in done.tokens]
    cost = {
        "nfe": done.nfe, "tokens": lengths, "seconds": done.seconds,
        "rejection_rate": done.rejection_rate,
    }  # fmt: skip
    found: dict[str, Any] = {"lengths": lengths, "finish": done.finish, "texts": done.texts[:3]}
    if options.stop == "none":
        judge = load_judge(folder / "models" / job.settings["judge"])
        _, rest = _real_texts(folder, scale, words, options.max_new_tokens)
        quality = sample_quality(done.texts, judge.encode, judge=judge, reference=rest, cost=cost)
        found["quality"] = quality.record()
    else:
        found["nfe"] = done.nfe
    return found


def _real(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    """The same figures of real text, and of its words in random order."""
    judge = load_judge(folder / "models" / job.settings["judge"])
    real, rest = _real_texts(folder, scale, judge.tokenizer, job.settings["tokens"])
    lines = (folder / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    passages = [json.loads(line)["text"] for line in lines]
    measure = partial(sample_quality, encode=judge.encode, judge=judge, reference=rest)
    return {
        "real": measure(real).record(),
        "shuffled": measure(shuffled(real)).record(),
        # The end-of-text token is one of a text's own.
        "lengths": [len(judge.encode(text)) + 1 for text in passages],
    }


def _real_texts(folder: Path, scale: Scale, words: Any, tokens: int) -> tuple[list[str], list[str]]:
    """As many windows of the test text as samples, evenly spread, and the others."""
    documents = open_documents(str(folder / "data" / "test.jsonl"))
    packed = pack(documents, words, length=tokens, bos=True)
    texts = [
        str(words.decode(row, skip_special_tokens=True)) for row in stack(packed, 0)["x_0"].tolist()
    ]
    step = max(2, len(texts) // scale.samples)
    chosen = range(0, len(texts), step)[: scale.samples]
    return [texts[i] for i in chosen], [t for i, t in enumerate(texts) if i not in chosen]


def _variance(folder: Path, scale: Scale, job: Job) -> dict[str, Any]:
    batches, rows, draws = scale.variance
    model, x_0 = _open(folder, job, batches * rows)
    size = job.settings["block_size"]
    found = [
        variance(model, x_0, name, block_size=size, batch_size=rows, draws=draws)
        for name in DEFAULT_ESTIMATORS
    ]
    return {"estimators": [x.record() for x in found]}
