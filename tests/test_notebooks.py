"""The notebooks of docs/ run, small, in a kernel of their own.

`python tests/test_notebooks.py` runs them in full and writes them back with what they show.
"""

import os
import re
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def run(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Runs every cell in `folder`; raises what a cell raises."""
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()


def shown(notebook: nbformat.NotebookNode) -> list[set[str]]:
    """Of each cell of code, what kinds of things it shows."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [{x for one in cell for x in one.get("data", {one.get("name")})} for cell in outputs]
    return [kind - {"stderr"} for kind in kinds]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_was_committed_as_it_ran(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    committed = nbformat.read(path, as_version=4)
    nbformat.validate(committed)
    small = nbformat.read(path, as_version=4)
    first = next(cell for cell in small.cells if cell.cell_type == "code")
    first.source, changed = re.subn(r"^(steps|samples) = \d+", r"\1 = 2", first.source, flags=re.M)
    assert changed
    run(small, tmp_path)
    assert shown(small) == shown(committed), "run it in full again: see this file's first lines"
    counts = [cell.execution_count for cell in committed.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What a cell shows, its lines in one piece, and without what libraries warn of."""
    found: list[nbformat.NotebookNode] = []
    for one in outputs:
        if one.get("name") == "stdout" and found and found[-1].get("name") == "stdout":
            found[-1].text += one.text
        elif one.get("name") != "stderr":
            found.append(one)
    return found


def main() -> None:
    from tempfile import TemporaryDirectory

    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        with TemporaryDirectory() as folder:
            os.environ["BLOCKDIFF_CACHE"] = f"{folder}/cache"
            run(notebook, Path(folder))
        for cell in notebook.cells:
            cell.metadata.clear()  # when each cell ran, which changes every time
            if cell.cell_type == "code":
                cell.outputs = joined(cell.outputs)
        notebook.metadata = {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        nbformat.write(notebook, path)


if __name__ == "__main__":
    sys.exit(main())
