"""What is written: JSON by the standard, and failures of the disk told in one line."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from matplotlib import pyplot
from safetensors.torch import save_file

from blockdiff import cli
from blockdiff.outputs import to_json, write_failure, write_text
from helpers import largest_file

TENSOR = torch.arange(125_000.0)


def tokenizers_save(path: Path) -> None:
    words = {str(i): i for i in range(50_000)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0")).save(str(path))


# Each writes half a megabyte, in its own way.
WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "x" * 500_000),
    "open": lambda path: path.write_bytes(bytes(500_000)),
    "safetensors": lambda path: save_file({"x": TENSOR}, path),
    "torch": lambda path: torch.save({"x": TENSOR}, path),
    "torch, many": lambda path: torch.save({i: TENSOR[: i + 999].clone() for i in range(99)}, path),
    "tokenizers": tokenizers_save,
    "matplotlib": lambda path: pyplot.imsave(path, torch.rand(300, 300).numpy(), format="png"),
}


def failure_of(writer: str, path: Path) -> str:
    with pytest.raises(Exception) as caught:
        WRITERS[writer](path)
    line = write_failure(caught.value)
    assert line is not None and "\n" not in line, caught.value
    return line


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_size_limit_is_one_line(tmp_path: Path, writer: str) -> None:
    with largest_file(20_000):
        line = failure_of(writer, tmp_path / "file")
    assert "ulimit -f" in line or ("torch" in writer and "file-size limit" in line), line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("writer", ["open", "torch"])
def test_a_full_disk_is_one_line(writer: str) -> None:
    line = failure_of(writer, Path("/dev/full"))
    assert "the disk is full" in line, line


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO"])
def test_every_reason_a_disk_gives_is_known_from_python_and_rust(name: str) -> None:
    number = getattr(errno, name)
    words = os.strerror(number)
    own = write_failure(OSError(number, words, "runs/a/model.safetensors"))
    rust = write_failure(RuntimeError(f"Error while serializing: {words} (os error {number})"))
    assert own is not None and rust is not None
    assert "(runs/a/model.safetensors)" in own and own.count("\n") == 0
    assert rust.split(";")[1] == own.split(";")[1], "the same advice"


@pytest.mark.parametrize(
    "error",
    [ValueError("no"), KeyError("os error"), RuntimeError("shape [28]"), OSError("a hub's own"),
     ConnectionError("reset"), MemoryError()],
)  # fmt: skip
def test_what_is_no_failure_of_the_disk_is_left_alone(error: Exception) -> None:
    assert write_failure(error) is None


def test_a_run_that_meets_a_file_size_limit_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("The law of the land is the law. " * 400)
    words = ["train", "--data", tmp_path / "text.txt", "--vocab-size", 300, "--length", 16,
             "--steps", 2, "--save-every", 1, "--batch-size", 2, "--report-to", "none",
             "--eval-windows", 2, "--out", tmp_path / "run"]  # fmt: skip
    with largest_file(2_000_000), pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ulimit -f" in last and "--resume" in last, last
    cli.main([str(word) for word in ["train", "--resume", "--out", tmp_path / "run"]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_null_where_a_figure_is_none(value: float) -> None:
    text = to_json({"a": [value, 1.5, (value,)], "b": {"c": value}, "世": "界"})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, 1.5, [None]], "b": {"c": None}, "世": "界",
    }  # fmt: skip


def test_a_text_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new, " * 10_000 + "\ud800")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.json"]
    write_text(path, "new")
    assert path.read_text() == "new"
