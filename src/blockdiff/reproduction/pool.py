"""Running a plan: as many workers as cores, what is done stays done.

Each worker computes on one core. A job starts when those it needs are done, the costliest first.
Interrupted at any point, the same command goes on from the results and checkpoints that are there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from blockdiff import checks
from blockdiff.data.corpora import load_corpus, split_documents
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.reproduction.plan import SMOKE, Job, Scale, plan
from blockdiff.reproduction.report import write_report
from blockdiff.reproduction.work import begin_worker, result_path, work
from blockdiff.training.record import commit

PLAN_FILE = "plan.json"
SPLIT_SEED = 0


def prepare(folder: Path, data: str, scale: Scale, overwrite: bool = False) -> None:
    """The folder with its plan, split and tokenizer; one that is there goes on if it is the same.

    Raises `InputError` when the folder holds something else, or another plan.
    """
    wish = json.loads(json.dumps({"data": data, "scale": asdict(scale)}))
    path = folder / PLAN_FILE
    if folder.exists() and any(folder.iterdir()):
        if not path.is_file():
            raise InputError(
                f"{folder} is not empty and holds no reproduction; choose another --out"
            )
        if not overwrite:
            there = json.loads(path.read_text(encoding="utf-8"))
            if {key: there.get(key) for key in wish} != wish:
                raise InputError(
                    f"{folder} holds a reproduction of another size or data; replace it with "
                    "--overwrite, or choose another --out"
                )
            _check_results(folder, scale)
            return
        shutil.rmtree(folder)
    train, test = (
        [passage for text in part for passage in passages(text, scale.sentences)]
        for part in split_documents(list(load_corpus(data)), scale.test_fraction, SPLIT_SEED)
    )
    # Whole or not at all: an interrupted beginning leaves nothing under the folder's name.
    fresh = folder.with_name(f".{folder.name}-beginning")
    shutil.rmtree(fresh, ignore_errors=True)
    (fresh / "data").mkdir(parents=True)
    for name, part in (("train", train), ("test", test)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (fresh / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    train_tokenizer(train, scale.vocab_size).save_pretrained(fresh / "tokenizer")
    (fresh / PLAN_FILE).write_text(json.dumps(wish, indent=1) + "\n", encoding="utf-8")
    fresh.replace(folder)


def _check_results(folder: Path, scale: Scale) -> None:
    """Raises `InputError` if a result there is of a job of the same name in another plan."""
    for job in plan(scale):
        path = result_path(folder, job.name)
        if path.is_file():
            there = json.loads(path.read_text(encoding="utf-8"))["job"] | {"cost": job.cost}
            if there != json.loads(json.dumps(job.record())):
                raise InputError(
                    f"{path} is of another plan; start again with --overwrite, or choose "
                    "another --out"
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
    scale = SMOKE if smoke else Scale()
    folder = Path(out)
    prepare(folder, data, scale, overwrite)
    cores = os.cpu_count()
    run(folder, scale, workers if workers is not None else cores if cores is not None else 1)
    print(write_report(folder, scale, data))
