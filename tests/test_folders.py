"""Output folders: every kind of path is good or refused before work; nothing foreign is lost."""

import contextlib
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdiff import cli, folders
from blockdiff.data.corpora import Corpus
from blockdiff.data.tokenizers import load_tokenizer, write_tokenizer
from blockdiff.errors import InputError
from blockdiff.outputs import new_file

COMMANDS = {
    "train": ["train"],
    "resume": ["train", "--resume"],
    "overwrite": ["train", "--overwrite"],
    "tokenizer": ["tokenizer"],
    "demo": ["demo"],
    "reproduce": ["reproduce", "paper-mini"],
}


def a_file(folder: Path) -> str:
    (folder / "file").write_text("kept")
    return str(folder / "file")


def a_link(folder: Path, to: Path) -> str:
    (folder / "link").symlink_to(to)
    return str(folder / "link")


def a_circle(folder: Path) -> str:
    (folder / "one").symlink_to(folder / "two")
    (folder / "two").symlink_to(folder / "one")
    return str(folder / "one")


# A path that nothing can be written to, made in a folder; `~` has no home (see `nowhere`).
BAD: dict[str, Callable[[Path], str]] = {
    "empty": lambda folder: "",
    "file": a_file,
    "below a file": lambda folder: a_file(folder) + "/run",
    "far below a file": lambda folder: a_file(folder) + "/a/b/run",
    "link to a file": lambda folder: a_link(folder, Path(a_file(folder))),
    "link to nothing": lambda folder: a_link(folder, folder / "nothing"),
    "below a link to nothing": lambda folder: a_link(folder, folder / "nothing") + "/run",
    "circle of links": a_circle,
    "name too long": lambda folder: str(folder / ("x" * 256)),
    "name too long above": lambda folder: str(folder / ("x" * 300) / "run"),
    "path too long": lambda folder: str(folder) + "/x" * 2500,
    "URL": lambda folder: "s3://bucket/run",
    "another URL": lambda folder: "https://example.org/run",
    "NUL": lambda folder: str(folder / "a\0b"),
    "no UTF-8": lambda folder: str(folder / "a\udcff"),
    "no home": lambda folder: "~/run",
    "no such user": lambda folder: "~no-such-user-here/run",
    "device": lambda folder: "/dev/full",
    "below a device": lambda folder: "/dev/null/run",
    "proc": lambda folder: "/proc/blockdiff/run",
    "proc itself": lambda folder: "/proc",
}


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to make bad paths in; there is no home, and reading a corpus fails the test."""

    def unknown(*_: object) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(Corpus, "__iter__", lambda self: pytest.fail("it began to work"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below, with its time and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        there = path.is_file()
        found[str(path.relative_to(folder))] = (
            path.lstat().st_mtime_ns if there else 0,
            path.read_bytes() if there else b"",
        )
    return found


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    printed = capsys.readouterr()
    assert stop.value.code == 2, printed.err
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("blockdiff: error: "), printed.err
    assert printed.out == ""
    return lines[0]


# -- kinds of paths -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", BAD)
def test_an_output_folder_that_can_be_none_is_refused_before_work(
    nowhere: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    out = BAD[kind](nowhere)
    before = everything(nowhere)
    refused(capsys, *COMMANDS[command], f"--out={out}")
    assert everything(nowhere) == before


@pytest.mark.parametrize("kind", BAD)
def test_a_file_to_be_written_that_can_be_none_is_refused(nowhere: Path, kind: str) -> None:
    path = BAD[kind](nowhere)
    before = everything(nowhere)
    with pytest.raises(InputError, match="`page`"):
        new_file("page", path)
    assert everything(nowhere) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_permission_is_refused(
    nowhere: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    nowhere.chmod(0o500)
    try:
        refused(capsys, *COMMANDS[command], f"--out={nowhere / 'run'}")
    finally:
        nowhere.chmod(0o700)


@pytest.mark.parametrize("error", [13, 28, 30, 122])
def test_a_folder_that_takes_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """No permission, a full disk, a read-only one, a quota: whatever the first write says."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("tempfile.mkstemp", fail)
    with pytest.raises(InputError, match=os.strerror(error)), folders.claim(tmp_path / "a" / "b"):
        pytest.fail("it was taken")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=os.strerror(error)):
        new_file("plot", tmp_path / "plot.png")


GOOD: dict[str, Callable[[Path], str]] = {
    "new": lambda folder: str(folder / "run"),
    "new, deep": lambda folder: str(folder / "a" / "b" / "run"),
    "this one": lambda folder: ".",
    "empty": lambda folder: str(folder),
    "link to a folder": lambda folder: a_link(folder.parent, folder),
    "with a slash": lambda folder: f"{folder}/run/",
    "with a dot": lambda folder: f"{folder}/./x/../run",
    "spaces and more": lambda folder: str(folder / " $HOME [red] 世界\n'\" "),
    "a mounted disk": lambda folder: str((folder / "lost+found").mkdir() or folder),
    "home": lambda folder: "~/run",
    "relative": lambda folder: "a/../run" if not (folder / "a").mkdir() else "",
}


@pytest.mark.parametrize("kind", GOOD)
def test_every_folder_that_takes_files_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """And again with `overwrite`, which replaces what is in it and never the folder itself."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(place))
    text = tmp_path / "text.txt"
    text.write_text("the law of the land is the law " * 9)
    out = GOOD[kind](place)
    write_tokenizer(str(text), out, 300)
    folder = Path(out).expanduser()
    number = folder.stat().st_ino
    with pytest.raises(InputError, match="already holds a tokenizer"):
        write_tokenizer(str(text), out, 300)
    (folder / "tokenizer.json").write_text("{}")
    write_tokenizer(str(text), out, 300, overwrite=True)
    assert load_tokenizer(folder).mask_token == "<|mask|>"
    assert folder.stat().st_ino == number
    names = {path.name for path in folder.iterdir()} - {"lost+found", "a"}
    assert names == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("option", ["--page", "--plot"])
def test_commands_try_their_files_before_the_work(
    nowhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(
        "blockdiff.writing.load_in", lambda *_, **__: pytest.fail("it began to work")
    )
    command = {"--page": ["generate", "starter"], "--plot": ["variance", "starter", "--data", "."]}
    for kind in ("below a file", "name too long", "URL"):
        folder = nowhere / kind
        folder.mkdir()
        assert option in refused(capsys, *command[option], f"{option}={BAD[kind](folder)}")


# -- what is replaced -----------------------------------------------------------------------------

NAMES = {
    "run": [
        "run.json", "config.json", "model.safetensors", "metrics.jsonl", "loss.png",
        "tokenizer.json", "tokenizer_config.json", "checkpoints/checkpoint-4/optimizer.pt",
        "checkpoints/checkpoint-4/complete", "tensorboard/events.out.tfevents.1.host.2.0",
        ".saving-abcdefgh/model.safetensors", ".writing-abcdefgh", ".lock",
    ],
    "demo": [
        "ar/run.json", "ar/model.safetensors", "bd3lm/run.json", "bd3lm/.lock", "report.md",
        "metrics.jsonl", "loss.png", "denoising.html",
    ],
    "reproduction": [
        "plan.json", "data/train.jsonl", "data/test.jsonl", "tokenizer/tokenizer_config.json",
        "models/s0-L4/run.json", "models/s0-L4/checkpoints/checkpoint-10/model.safetensors",
        "results/s0-L4.json", "report/report.md", "report/lengths.png",
    ],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
}  # fmt: skip
FOREIGN = [
    "notes.txt", "data.txt", "README", "run.json.bak", ".git/config", "model.safetensors/x",
    "checkpoints/checkpoint-best/model.safetensors", "checkpoints/checkpoint-4.tar",
    "checkpoints/notes", "tensorboard/notes.txt", "ar/notes", "ar/checkpoints/x", "bd3lm/a/b",
    "data/extra.jsonl", "tokenizer/notes", "models/best/run.json", "models/s0-L4/thesis.tex",
    "results/notes.md", "report/slides.pdf", "src",
]  # fmt: skip


def written(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return folder


@pytest.mark.parametrize("kind", NAMES)
def test_overwrite_replaces_what_our_commands_wrote(tmp_path: Path, kind: str) -> None:
    folder = written(tmp_path / "out", NAMES[kind])
    with (
        pytest.raises(InputError, match=f"already holds a {kind}"),
        folders.claim(folder, kinds=(kind,)),
    ):
        pytest.fail("it was taken")
    with folders.claim(folder, overwrite=True, kinds=(kind,)):
        folders.clear(folder, (kind,))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("kind", NAMES)
def test_a_folder_with_anything_else_in_it_is_not_touched(
    tmp_path: Path, kind: str, name: str
) -> None:
    names = [own for own in NAMES[kind] if not name.startswith(f"{own}/")]
    folder = written(tmp_path / "out", [*names, name])
    before = everything(folder)
    with (
        pytest.raises(InputError, match="is not replaced"),
        folders.claim(folder, overwrite=True, kinds=(kind,)),
    ):
        pytest.fail("it was taken")
    assert everything(folder) == before
    # And nothing goes that came meanwhile.
    folders.clear(folder, (kind,))
    assert (folder / name).exists()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "resume"])
@pytest.mark.parametrize("kind", ["run", "demo", "reproduction", "tokenizer", "nothing"])
def test_every_command_refuses_a_foreign_file_before_work(
    nowhere: Path, capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    folder = written(nowhere / "out", [*NAMES.get(kind, []), "notes.txt"])
    before = everything(folder)
    for words in (["--overwrite"], []):
        refused(capsys, *COMMANDS[command], f"--out={folder}", *words)
    assert everything(folder) == before


@pytest.mark.parametrize("kind", NAMES)
def test_an_interrupted_clearing_can_be_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What says of which kind a folder is goes last, wherever the command is killed."""
    remove = Path.unlink
    for allowed in range(len(NAMES[kind])):
        folder = written(tmp_path / str(allowed), NAMES[kind])
        left = [allowed]

        def few(self: Path, missing_ok: bool = False, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            remove(self, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", few)
            with contextlib.suppress(KeyboardInterrupt):
                folders.clear(folder, (kind,))
        with folders.claim(folder, overwrite=True, kinds=(kind,)):
            folders.clear(folder, (kind,))
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("names", [[], [".lock"], ["ar/.lock"], [".writing-abcdefgh", "ar/.lock"]])
def test_what_a_killed_beginning_leaves_is_in_nobodys_way(tmp_path: Path, names: list[str]) -> None:
    folder = written(tmp_path / "out", names)
    with folders.claim(folder, kinds=("demo",)):
        pass


def test_links_among_the_folders_are_emptied_and_stay(tmp_path: Path) -> None:
    """Checkpoints on a bigger disk; and a link is never followed out of the list of names."""
    disk, elsewhere = tmp_path / "disk", tmp_path / "elsewhere"
    written(disk, ["checkpoint-4/optimizer.pt"])
    written(elsewhere, ["kept"])
    folder = written(tmp_path / "out", ["run.json"])
    (folder / "checkpoints").symlink_to(disk)
    (disk / "checkpoint-8").symlink_to(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere / "kept")
    with folders.claim(folder, overwrite=True):
        folders.clear(folder)
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    assert list(disk.iterdir()) == []
    assert (elsewhere / "kept").exists()


# -- the lock -------------------------------------------------------------------------------------

HOLD = """
import os, sys
from blockdiff import folders
with folders.claim(sys.argv[1], go_on=True):
    if os.fork() == 0:  # such as a data loading worker
        os.close(1)
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> "subprocess.Popen[bytes]":
    """A process that holds tmp_path/out, with a child that outlives it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("kind", ["nothing", "run"])
def test_a_folder_has_one_writer_at_a_time_released_by_death(
    nowhere: Path, capsys: pytest.CaptureFixture[str], holder: "subprocess.Popen[bytes]", kind: str
) -> None:
    out = written(nowhere / "out", NAMES["run"][:-1] if kind == "run" else [])
    before = everything(out)
    for name, words in COMMANDS.items():
        message = refused(capsys, *words, f"--out={out}")
        # What is no run at all cannot be resumed, whoever is in it.
        assert "a run is going on" in message or name == "resume"
    assert everything(out) == before
    with pytest.raises(InputError, match="a run is going on"), folders.claim(out, go_on=True):
        pytest.fail("it was taken")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with folders.claim(out, go_on=True):
        assert (out / ".lock").exists()
    assert not (out / ".lock").exists()


def test_a_run_within_a_folder_keeps_it_from_being_replaced(tmp_path: Path) -> None:
    """`train --resume` in one of a demo's two runs, say; a lock file alone is nobody."""
    demo = written(tmp_path / "demo", NAMES["demo"])
    with folders.claim(demo / "ar", go_on=True):
        before = everything(demo)
        with (
            pytest.raises(InputError, match=r"going on in .*/ar"),
            folders.claim(demo, overwrite=True, kinds=("demo",)),
        ):
            pytest.fail("it was taken")
        assert everything(demo) == before
    with folders.claim(demo, overwrite=True, kinds=("demo",)):
        pass


def test_a_refused_folder_made_for_the_trial_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), folders.claim(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
