"""Running a plan: as many workers as cores, what is done stays done.

Each worker computes on one core. A job starts when those it needs are done, the costliest first.
Interrupted at any point, the same command goes on from the results and checkpoints that are there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from blockdiff import checks, folders
from blockdiff.apps.reproduction.plan import SMOKE, Job, Scale, plan
from blockdiff.apps.reproduction.report import write_report
from blockdiff.apps.reproduction.work import begin_worker, result_path, work
from blockdiff.data.corpora import load_corpus, split_documents
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.outputs import local_path, staging, to_json, write_text
from blockdiff.training.record import commit

PLAN_FILE, TOKENIZER = "plan.json", "tokenizer"
# What `overwrite` replaces.
KINDS = ("reproduction", "run", "demo")
SPLIT_SEED = 0


@contextmanager
def prepared(out: str | Path, data: str, scale: Scale, overwrite: bool = False) -> Iterator[Path]:
    """The folder with its plan, split and tokenizer, nobody else's until the end of the block.

    One that is there goes on if it is the same. Raises `InputError` when the folder holds
    something else, or another plan.
    """
    wish = json.loads(json.dumps({"data": data, "scale": asdict(scale)}))
    go_on = not overwrite and os.path.isfile(local_path("out", out) / PLAN_FILE)
    with folders.claim(out, overwrite=overwrite, go_on=go_on, kinds=KINDS) as folder:
        if go_on:
            _check_plan(folder, wish)
            _check_results(folder, scale)
        if not go_on or not (folder / TOKENIZER / "tokenizer_config.json").is_file():
            _prepare(folder, wish, data, scale)
        yield folder


def _prepare(folder: Path, wish: dict[str, Any], data: str, scale: Scale) -> None:
    """The plan first, by which the folder is known; the tokenizer last: now all is there."""
    parts = split_documents(load_corpus(data), scale.test_fraction, SPLIT_SEED)
    train, test = ([p for text in part for p in passages(text, scale.sentences)] for part in parts)
    tokenizer = train_tokenizer(train, scale.vocab_size)
    folders.clear(folder, KINDS)
    write_text(folder / PLAN_FILE, to_json(wish, indent=1) + "\n")
    (folder / "data").mkdir(exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        lines = "".join(to_json({"text": text}) + "\n" for text in part)
        write_text(folder / "data" / f"{name}.jsonl", lines)
    (folder / TOKENIZER).mkdir(exist_ok=True)
    with staging(folder / TOKENIZER) as temporary:
        tokenizer.save_pretrained(temporary)


def _check_plan(folder: Path, wish: dict[str, Any]) -> None:
    try:
        there = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{folder / PLAN_FILE} is damaged: {error}; choose another `out`"
        ) from None
    if not isinstance(there, dict) or {key: there.get(key) for key in wish} != wish:
        raise InputError(
            f"{folder} holds a reproduction of another size or data; replace it with "
            "`overwrite`, or choose another `out`"
        )


def _check_results(folder: Path, scale: Scale) -> None:
    """Raises `InputError` if a result there is of a job of the same name in another plan."""
    for job in plan(scale):
        path = result_path(folder, job.name)
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))["job"] | {"cost": job.cost}
            if there != json.loads(json.dumps(job.record())):
                raise InputError(
                    f"{path} is of another plan; start again with `overwrite`, or choose "
                    "another `out`"
                )


def passages(text: str, sentences: int) -> list[str]:
    """A text in passages of so many sentences, the last one shorter; 0 leaves it whole."""
    if not sentences:
        return [text]
    parts = [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text) if part.strip()]
    return [" ".join(parts[i : i + sentences]) for i in range(0, len(parts), sentences)]


def run(folder: Path, scale: Scale, workers: int, *, progress: bool = True) -> None:
    """Does every job of the plan that has no result yet.

    Raises `InputError` naming a job that failed; the others' results stay.
    """
    jobs = plan(scale)
    done = {job.name for job in jobs if result_path(folder, job.name).is_file()}
    waiting = sorted((job for job in jobs if job.name not in done), key=lambda job: -job.cost)
    running: dict[Future[None], Job] = {}
    # Read when a worker imports torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not progress,
    )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    code = commit()
    with (
        bar,
        ProcessPoolExecutor(workers, context, initializer=begin_worker, initargs=(1,)) as pool,
    ):
        task = bar.add_task("", total=sum(job.cost for job in jobs))
        bar.advance(task, sum(job.cost for job in jobs if job.name in done))
        try:
            while waiting or running:
                for job in [job for job in waiting if done.issuperset(job.after)]:
                    if len(running) < workers:
                        waiting.remove(job)
                        running[pool.submit(work, folder, scale, job, code)] = job
                bar.update(task, description=", ".join(job.name for job in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    done.add(job.name)
                    bar.advance(task, job.cost)
        except InputError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise InputError(f"job {job.name}: {error}") from None


def reproduce(out: str, data: str, workers: int | None, smoke: bool, overwrite: bool) -> None:
    """Does the whole plan in a folder, or what is left of it.

    Raises `InputError` on bad input, or when a job failed.
    """
    checks.numbers(workers=workers)
    cores = os.cpu_count() if workers is None else workers
    scale = SMOKE if smoke else Scale()
    with prepared(out, data, scale, overwrite) as folder:
        run(folder, scale, 1 if cores is None else cores)
        print(write_report(folder, scale, data))
