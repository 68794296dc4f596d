"""What the shells offer on Tab: in a real bash, and the scripts of the others."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockdiff import cli
from blockdiff.commands import COMMANDS
from blockdiff.commands.completion import completions
from blockdiff.registry import ORDERS


def offered(*words: str) -> list[str]:
    """The names, then the kinds of paths, that may stand in the place of the last word."""
    items = completions(list(words[:-1]), words[-1], COMMANDS)
    return [one.value if one.type == "plain" else f"<{one.type}>" for one in items]


def test_commands_and_options() -> None:
    assert offered("") == [*COMMANDS, "--help", "--version"]
    assert offered("ev") == ["evaluate", "evaluate-samples"]
    assert offered("help", "tr") == ["train"]
    assert offered("nosuch", "") == []
    assert offered("generate", "starter", "--thr") == ["--threshold"]
    assert offered("generate", "--threshold", "0.9", "--thr") == [], "it is given"
    assert offered("generate", "--threshold=0.9", "--thr") == []
    assert offered("generate", "--choices", "a", "--choi") == ["--choices"], "several may be"
    assert {"--config", "--plugin", "--help"} <= set(offered("train", "--"))
    assert offered("train", "--no-a") == ["--no-across-documents", "--no-adaln"]
    for name, command in COMMANDS.items():
        flags = {option.flag for option in command.options.values()}
        assert flags <= set(offered(name, "--"))


def test_values() -> None:
    assert offered("generate", "starter", "--sampler", "") == ["auto", *ORDERS]
    assert offered("generate", "--sampler=ver") == ["--sampler=verified"]
    assert offered("generate", "--sampler", "=", "ver") == ["verified"], "as bash cuts it"
    assert offered("generate", "--sampler", "=") == ["auto", *ORDERS]
    assert offered("generate", "--watch", "--json", "sta") == ["starter", "<dir>"], "switches"
    assert offered("generate", "st") == offered("score", "--model", "st") == ["starter", "<dir>"]
    assert offered("generate", "m", "") == [], "a prompt is any text"
    assert offered("train", "") == ["pydoc", "<file>"] == offered("train", "a.txt", "")
    assert offered("train", "--lr", "") == [], "a number"
    assert offered("train", "--config", "owt/bd3lm-4") == [
        "owt/bd3lm-4", "owt/bd3lm-4-exact-k", "owt/bd3lm-4-from-ar", "owt/bd3lm-4-scratch", "<file>"
    ]  # fmt: skip
    assert offered("generate", "--config", "owt") == ["<file>"], "recipes are of training"
    assert offered("train", "--device", "c") == ["cpu", "cuda"]
    assert offered("export", "--model", "starter", "") == ["<dir>"], "out is what is left"
    assert offered("completion", "") == ["bash", "zsh", "fish"]


TYPED = [
    ("blockdiff generate st", ["starter", "start here"]),
    ("blockdiff generate starter --sampler=ve", ["verified"]),
    ("blockdiff generate starter --sampler ", ["auto", *ORDERS]),
    ("blockdiff train --config opt", ["options.yaml"]),
    ("blockdiff train --data ./te", ["./text.txt"]),
]


def source(shell: str) -> str:
    """Of the program that runs these tests, under the name that the script is for."""
    run = f'exec "{sys.executable}" -m blockdiff "$@"\n'
    Path("blockdiff").write_text(f"#!/bin/sh\n{run}")
    Path("blockdiff").chmod(0o755)
    os.environ["PATH"] = f"{Path.cwd()}{os.pathsep}{os.environ['PATH']}"
    script = subprocess.run(["./blockdiff", "completion", shell], capture_output=True, text=True)
    assert script.returncode == 0 and not script.stderr
    return script.stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    for name in ("options.yaml", "text.txt"):
        Path(name).touch()
    Path("start here").mkdir()


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_completes(folder: None) -> None:
    """By the function that Tab calls, with the line cut into words as readline does."""
    lines = [source("bash"), "compopt() { :; }"]  # which works on Tab only
    for line, _ in TYPED:
        words = line.replace("=", " = ").split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        lines.append(
            f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}\n"
            f"_blockdiff_completion blockdiff '{words[-1]}' ''\n"
            'printf "%s|" "${COMPREPLY[@]}"; echo'
        )
    run = subprocess.run(["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert not run.stderr
    found = [line.split("|")[:-1] for line in run.stdout.splitlines()]
    assert found == [expected for _, expected in TYPED]


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_tab_in_a_terminal(folder: None) -> None:
    """A person's bash, on a terminal: the word is finished, and a folder gets its slash."""
    pexpect = pytest.importorskip("pexpect")
    Path("completion.bash").write_text(source("bash"))
    shell = pexpect.spawn("bash", ["--norc", "--noprofile"], encoding="utf-8", timeout=20,
                          env=os.environ | {"PS1": "> ", "TERM": "dumb"})  # fmt: skip
    shell.sendline("bind 'set enable-bracketed-paste off'; . ./completion.bash; echo re''ady")
    shell.expect("ready")
    for typed, finished in (("echo x; blockdiff evaluate-s", "evaluate-samples "),
                            ("blockdiff generate starter --sampler ver", "verified "),
                            ("blockdiff evaluate starth", ""),
                            ("blockdiff export starter start\\ h", "here/")):  # fmt: skip
        shell.send(f"{typed}\t")
        if finished:
            shell.expect_exact(finished[-6:])
        shell.send("\x15\r")  # the line is deleted; Ctrl-C may meet the function that completes
        shell.expect("> ")
    shell.close(force=True)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells(shell: str, folder: None) -> None:
    script = source(shell)
    assert f"_BLOCKDIFF_COMPLETE={shell}_complete" in script and "blockdiff" in script
    if shutil.which(shell):
        run = subprocess.run([shell, "-n", "/dev/stdin"], input=script, capture_output=True, text=1)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("shell", "words", "at", "answer"),
    [
        ("bash", "blockdiff\ngenerate\nm\n--sampler\nver", "4", "plain,verified\n"),
        ("zsh", "blockdiff generate m --sampler ver", "4", "plain\nverified\n_\n"),
        ("fish", "blockdiff generate m --sampler ver", "ver", "plain,verified\n"),
    ],
)
def test_each_shells_question_is_answered(
    shell: str, words: str, at: str, answer: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("_BLOCKDIFF_COMPLETE", f"{shell}_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", at)
    cli.main([])
    assert capsys.readouterr().out == answer


def test_an_answer_imports_nothing_heavy() -> None:
    code = (
        "import sys; from blockdiff import cli; cli.main([]); "
        "print({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"_BLOCKDIFF_COMPLETE": "bash_complete", "COMP_CWORD": "1",
                          "COMP_WORDS": "blockdiff ex"},
    )  # fmt: skip
    assert run.stdout.splitlines() == ["plain,export", "set()"]
