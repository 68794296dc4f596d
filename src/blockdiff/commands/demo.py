"""`blockdiff demo`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from blockdiff.commands.options import Command, Given


@dataclass(frozen=True)
class DemoOptions:
    """Train AR and a BD3-LM on the machine's own Python documentation and compare them.

    Attributes:
        out: Folder for models, report, plot and page.
        minutes: Time to stay within; fewer steps are trained on a slow machine.
        seed: Seed of everything random.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
        overwrite: Replace the demo that is there.
    """

    out: str = "runs/demo"
    minutes: float = 8.0
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False


def _run(given: Given) -> None:
    options = given.make(DemoOptions)
    from blockdiff.apps.demo import demo

    demo(**asdict(options))


COMMAND = Command(
    summary="Train AR and a BD3-LM on the Python documentation and compare them.",
    kinds=(DemoOptions,),
    run=_run,
    sections={"out": "Demo"},
    examples=("blockdiff demo --minutes 3 --out runs/small-demo",),
)
