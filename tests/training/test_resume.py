"""A resumed run: what it does, what it refuses, and what run.json tells of it."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from blockdiff import __version__, cli
from blockdiff.data.tokenizers import load_tokenizer, write_tokenizer
from blockdiff.errors import InputError
from blockdiff.training import run as running
from blockdiff.training.callbacks import read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.data import prepare_data
from blockdiff.training.record import commit
from blockdiff.training.run import train
from blockdiff.training.stored import RESUMABLE, load_config, load_record
from blockdiff.training.trainer import BlockDiffusionTrainer

TEXT = "the law of the land is the law, and the people of the land keep it. "


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(TEXT * 100, encoding="utf-8")
    return path


def small(corpus: Path, out: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        out=str(out), data=str(corpus), vocab_size=280, length=16, block_size=4, steps=3,
        batch_size=2, warmup=1, ema=0.9, precision="float32", log_every=1, save_every=1,
        eval_windows=4, report_to="none",
    )  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKDIFF_CACHE", str(folder / "cache"))
        train(small(corpus, folder / "run", validation_data=str(corpus)), progress=False)
    (folder / "run" / "loss.png").touch()  # the command's
    return folder / "run"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_commit_is_asked_for_without_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed meanwhile would leave git's index.lock in the user's checkout."""
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: asked.append(words) or done)
    done = subprocess.CompletedProcess([], 0, stdout="")
    assert commit() == ""
    assert asked and all(words[:2] == ["git", "--no-optional-locks"] for words in asked)


def resumed(out: Path, *words: object) -> None:
    cli.main(["train", "--resume", f"--out={out}", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        resumed(out, *words)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in message, message
    return message


# -- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--steps", 3], ["--eval-every", 0], ["--minutes", 5]])
def test_a_finished_run_is_not_touched(
    copied: Path, words: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(copied)
    resumed(copied, *words)
    assert everything(copied) == before
    assert "its steps were all done" in capsys.readouterr().out


KILLED: dict[str, tuple[Any, str]] = {
    "in the last validation": (BlockDiffusionTrainer, "evaluate"),
    "before the model is written": (running, "save_model"),
    "before the end is noted": (running, "last_validation"),
}


@pytest.mark.parametrize("where", KILLED)
def test_killed_after_its_last_step_a_run_ends_as_the_uninterrupted_one(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    config = small(corpus, tmp_path / "killed", validation_data=str(corpus))
    with monkeypatch.context() as patch:
        patch.setattr(*KILLED[where], killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, progress=False)
    done = train(replace(config, resume=True), progress=False)
    assert done.steps == 0
    for name in ("model.safetensors", "config.json"):
        assert (done.folder / name).read_bytes() == (finished / name).read_bytes(), name
    ours, theirs = (
        [{name: x for name, x in line.items() if name != "tokens_per_second"}
         for line in read_metrics(folder / "metrics.jsonl")]
        for folder in (done.folder, finished)
    )  # fmt: skip
    assert ours == theirs
    ours, theirs = (load_record(folder)["finished"] for folder in (done.folder, finished))
    assert (ours["steps"], ours["metrics"]) == (theirs["steps"], theirs["metrics"])


def test_a_model_that_went_missing_is_made_again(copied: Path) -> None:
    before = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").unlink()
    resumed(copied)
    assert (copied / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        # Each at its default, which is not what the run has.
        ("--block-size", 4), ("--lr", 3e-4), ("--seed", 0), ("--length", 128), ("--ema", 0.9999),
        ("--batch-size", 32), ("--warmup", 100), ("--preset", "nano"), ("--objective", "bd3lm"),
        ("--dropout", 0.1), ("--precision", "bf16"), ("--estimator", "exact_k"),
        ("--schedule", "linear"), ("--adaln", "true"), ("--across-documents", "true"),
        ("--validation-fraction", 0.05), ("--accumulate", 1), ("--weight-decay", 0),
        ("--max-grad-norm", 1), ("--data", "pydoc"), ("--vocab-size", 2048), ("--eos", "true"),
    ],
)  # fmt: skip
def test_what_is_given_counts_at_its_default_too(
    copied: Path, capsys: pytest.CaptureFixture[str], option: str, value: object
) -> None:
    other = {
        "block_size": 8, "lr": 1e-3, "seed": 7, "preset": "micro", "objective": "mdlm",
        "estimator": "paired", "schedule": "cosine", "adaln": False, "across_documents": False,
        "validation_fraction": 0.2, "accumulate": 2, "weight_decay": 0.1, "max_grad_norm": 0.5,
        "eos": False, "dropout": 0.0,
    }  # fmt: skip
    tell(copied, **other)
    before = everything(copied)
    message = refused(capsys, copied, option, value)
    assert option in message and "leave the option out" in message
    assert everything(copied) == before


def test_a_yaml_file_gives_options_as_well(
    copied: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("length: 128\n")
    assert "--length" in refused(capsys, copied, "--config", config)


def test_every_option_either_may_be_told_anew_or_is_refused_by_name() -> None:
    """A new option is a decision."""
    names = set(TrainConfig.__dataclass_fields__)
    assert names >= RESUMABLE
    assert {"length", "seed", "data", "lr", "ema", "precision", "backend", "compile"} <= (
        names - RESUMABLE
    )


def test_what_is_watched_may_be_told_anew(copied: Path) -> None:
    resumed(copied, "--steps", 4, "--save-every", 2, "--log-every", 2, "--eval-every", 0)
    stored = load_config(copied)
    assert (stored.steps, stored.save_every, stored.log_every, stored.eval_every) == (4, 2, 2, 0)


@pytest.mark.parametrize("steps", [1, 2])
def test_fewer_steps_than_are_done_are_refused(
    copied: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    before = everything(copied)
    assert "has done 3" in refused(capsys, copied, "--steps", steps)
    assert everything(copied) == before


def test_fewer_steps_than_planned_but_not_than_done_are_good(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "run", BlockDiffusionTrainer._save_checkpoint

    def killed(self: BlockDiffusionTrainer, *given: object) -> None:
        save(self, *given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BlockDiffusionTrainer, "_save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            train(small(corpus, out, steps=1000), progress=False)
    resumed(out, "--steps", 2)
    assert load_record(out)["finished"]["steps"] == 2


def tell(run: Path, **options: object) -> None:
    """Changes options in run.json."""
    stored = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(stored | options))


def test_another_number_of_steps_says_what_becomes_of_the_learning_rate(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(copied, lr_schedule="cosine")
    resumed(copied, "--steps", 4)
    said = capsys.readouterr().err
    assert re.search(r"learning rate goes from \S+ to \S+ at step 3: its cosine decay", said)


# -- the data -------------------------------------------------------------------------------------

CHANGED = {
    "other": "zebra quilt fox jumps. " * 200,
    "longer": TEXT * 101,
    "shorter": TEXT * 99,
    "one letter": (TEXT * 100).replace("l", "L", 1),
}


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("part", ["data", "validation_data"])
def test_a_run_is_not_resumed_on_other_text(
    copied: Path, tmp_path: Path, kind: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CHANGED[kind])
    tell(copied, **{part: str(text)})
    before = everything(copied)
    message = refused(capsys, copied, "--steps", 4)
    assert str(text) in message and "is not what the run" in message
    assert everything(copied) == before


def test_the_same_text_elsewhere_is_the_same(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 100)
    tell(copied, data=str(tmp_path / "text.txt"))
    resumed(copied, "--steps", 4)
    assert load_record(copied)["finished"]["steps"] == 4


# -- what run.json tells --------------------------------------------------------------------------


def test_the_record_of_a_run(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [f"--out={out}", "--data", corpus, "--vocab-size", 280, "--length", 16, "--steps", 1,
             "--batch-size", 2, "--eval-windows", 2, "--report-to", "none"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["blockdiff", "train", "it's this one", *map(str, words)])
        cli.main(["train", *map(str, words)])
    record = load_record(out)
    assert record["versions"] == {
        "blockdiff": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", record["commit"])
    assert record["command"].startswith("blockdiff train 'it'\"'\"'s this one' --out=")
    assert record["device"].startswith(("cpu (", "cuda"))
    assert datetime.fromisoformat(record["started"]).utcoffset() is not None
    assert record["resolved"]["precision"] in ("float32", "bf16")
    assert record["resolved"]["backend"] in ("dense", "blockwise", "flex")
    assert load_config(out).precision == record["resolved"]["precision"], "what auto became"
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in record["data"].values())
    data = prepare_data(replace(load_config(out), resume=True))
    assert data.fingerprints == record["data"]
    assert record["finished"]["steps"] == 1 and record["finished"]["metrics"]["eval_perplexity"] > 1
    resumed(out, "--steps", 2)
    again = load_record(out)
    assert [session["device"] for session in again["resumed"]] == [record["device"]]
    for name in ("started", "command", "data", "resolved", "versions"):
        assert again[name] == record[name]
    assert again["finished"]["steps"] == 2


def test_a_resumed_run_computes_in_the_precision_it_began_in(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockdiff.training.run.resolve_precision", lambda name, device: name)
    resumed(copied, "--steps", 4, "--precision", "auto")
    assert load_config(copied).precision == "float32"


BROKEN: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[:-20],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "deep": lambda text: "[" * 100_000,
    "unknown option": lambda text: text.replace('"lr":', '"learning":'),
    "wrong type": lambda text: text.replace('"length": 16', '"length": "16"'),
    "out of range": lambda text: text.replace('"length": 16', '"length": -16'),
    "no number": lambda text: text.replace('"steps": 3,', '"steps": NaN,', 1),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_run_json_is_one_line(
    copied: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "run.json"
    changed = BROKEN[kind](path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    before = everything(copied)
    assert "run.json" in refused(capsys, copied)
    assert everything(copied) == before


# -- small print ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_every_file_has_the_umasks_mode(corpus: Path, tmp_path: Path, mask: int) -> None:
    former = os.umask(mask)
    try:
        out = train(small(corpus, tmp_path / "run", report_to="tensorboard"), progress=False).folder
    finally:
        os.umask(former)
    cache = Path(os.environ["BLOCKDIFF_CACHE"])
    for path in [*out.rglob("*"), *cache.rglob("*")]:
        wanted = (0o666 if path.is_file() else 0o777) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, path


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "x", None, float("nan")])
def test_a_seed_that_no_generator_takes_is_refused(seed: Any) -> None:
    with pytest.raises(InputError, match="`seed`"):
        TrainConfig(seed=seed)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_both_ends_of_the_seeds_train(corpus: Path, tmp_path: Path, seed: int) -> None:
    done = train(small(corpus, tmp_path / "run", seed=seed, steps=1), progress=False)
    assert done.steps == 1


# -- another model's weights ----------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [270, 280, 300])
def test_a_tokenizer_that_is_not_the_models_own_is_refused(
    finished: Path, corpus: Path, tmp_path: Path, vocab_size: int
) -> None:
    """Smaller, larger, or of the same size with other tokens: its weights mean nothing to it."""
    other = tmp_path / "other.txt"
    other.write_text("zebra quilt fox jumps over many lazy dogs. " * 50)
    write_tokenizer(str(other), tmp_path / "words", vocab_size)
    out = tmp_path / "run"
    config = small(corpus, out, init_from=str(finished), tokenizer=str(tmp_path / "words"))
    with pytest.raises(InputError, match="leave `tokenizer` out"):
        train(config, progress=False)
    assert not out.exists()


def test_a_copy_of_the_models_own_tokenizer_is_its_own(
    finished: Path, corpus: Path, tmp_path: Path
) -> None:
    load_tokenizer(finished).save_pretrained(tmp_path / "words")
    config = small(corpus, tmp_path, init_from=str(finished), tokenizer=str(tmp_path / "words"))
    assert prepare_data(config).tokenizer.mask_token_id is not None
