"""`blockdiff export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockdiff.commands.options import Command, Given


@dataclass(frozen=True)
class ExportOptions:
    """Write a model in the layout of published checkpoints.

    Attributes:
        model: Folder or hub id of a model of this package; starter is the one that comes with it.
        out: Folder for the exported model.
        layout: Whose layout it is: bd3lm, that of the paper's checkpoints.
        overwrite: Replace a model that is there.
    """

    model: str
    out: str
    layout: Literal["bd3lm"] = "bd3lm"
    overwrite: bool = False


def _run(given: Given) -> None:
    options = given.make(ExportOptions)
    from blockdiff.models.export import export_folder

    export_folder(options.model, options.out, layout=options.layout, overwrite=options.overwrite)
    print(f"{options.out}: {options.model} in the {options.layout} layout")


COMMAND = Command(
    summary="Write a model in the layout of published checkpoints.",
    kinds=(ExportOptions,),
    run=_run,
    places=("model", "out"),
    sections={"model": "Exporting"},
    examples=(
        "blockdiff export runs/bd3lm exported --layout bd3lm",
        "blockdiff export runs/bd3lm exported --overwrite",
    ),
)
