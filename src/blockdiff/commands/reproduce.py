"""`blockdiff reproduce`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from blockdiff.commands.options import Command, Given


@dataclass(frozen=True)
class ReproduceOptions:
    """The paper's comparisons in miniature: train, measure, sample and report, in hours on a CPU.

    Attributes:
        what: What is reproduced.
        data: Corpus, as for train; the committed report is of State of the Union addresses.
        out: Folder for checkpoints, results, plots and report; the same command goes on where it
            was stopped.
        workers: Processes, each on one core; all cores when left out.
        smoke: The whole of it, minute: minutes instead of hours, to see that it runs.
        overwrite: Replace the reproduction that is there.
    """

    what: Literal["paper-mini"]
    data: str = "pydoc"
    out: str = "runs/paper-mini"
    workers: int | None = None
    smoke: bool = False
    overwrite: bool = False


def _run(given: Given) -> None:
    options = asdict(given.make(ReproduceOptions))
    from blockdiff.apps.reproduction.pool import reproduce

    options.pop("what")
    reproduce(**options)


COMMAND = Command(
    summary="The paper's comparisons in miniature: train, measure, sample and report.",
    kinds=(ReproduceOptions,),
    run=_run,
    places=("what",),
    sections={"what": "Reproduction"},
    examples=("blockdiff reproduce paper-mini --data sotu.jsonl --out runs/paper-mini",),
)
