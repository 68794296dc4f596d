"""Every recipe says what the paper does, and trains: two steps, on a stand-in for its text."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from blockdiff import cli
from blockdiff.cli import parse as parse_words
from blockdiff.data.corpora import load_corpus
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.models.hub import load_model
from blockdiff.recipes import recipes
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train

RECIPES = Path(__file__).parents[1] / "recipes"
SETS = ("lm1b", "owt")
FILES = sorted(path for name in SETS for path in RECIPES.glob(f"{name}/*.yaml"))
PAPER = ("ar", "sedd", "mdlm", "base", "bd3lm-16", "bd3lm-8", "bd3lm-4", "bd3lm-1")
# What is small or local in the stand-in; everything else is the recipe's.
STAND_IN = {"preset": "nano", "length": 32, "batch_size": 4, "steps": 2, "warmup": 1,
            "workers": 0, "log_every": 1, "save_every": 2, "eval_every": 2, "eval_windows": 4,
            "report_to": "none", "split": "train", "validation_split": None}  # fmt: skip


def parse(path: Path, *more: str) -> TrainConfig:
    config: TrainConfig = parse_words(["train", "--config", str(path), *more])[1].make(TrainConfig)
    return config


def in_order(name: str) -> list[Path]:
    """A data set's recipes, each after the one whose model it starts from."""
    left = {path.stem: path for path in FILES if path.parent.name == name}
    ordered: list[Path] = []
    while left:
        for stem, path in list(left.items()):
            start = parse(path).init_from
            if start is None or Path(start).name not in left:
                ordered.append(left.pop(stem))
    return ordered


@pytest.mark.parametrize("name", SETS)
def test_every_run_of_the_paper_has_its_recipe(name: str) -> None:
    stems = {path.stem for path in FILES if path.parent.name == name}
    assert set(PAPER) <= stems
    assert {"bd3lm-4-scratch", "bd3lm-4-from-ar", "grown-4", "grown-8", "grown-16"} <= stems


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_a_recipe_has_the_papers_settings(path: Path) -> None:
    config = parse(path)
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= {
        f.name for f in fields(TrainConfig)
    }
    assert f"blockdiff train --config recipes/{path.parent.name}/{path.stem}.yaml" in (
        path.read_text(encoding="utf-8")
    )
    assert config.out == f"runs/{path.parent.name}/{path.stem}"
    assert (config.lr, config.lr_schedule, config.warmup) == (3e-4, "constant", 2500)
    assert (config.batch_size, config.weight_decay, config.max_grad_norm) == (512, 0.0, 1.0)
    assert (config.dropout, config.ema, config.precision) == (0.1, 0.9999, "bf16")
    assert config.preset == "small" and config.adaln
    length, tokenizer = {"lm1b": (128, "bert-base-uncased"), "owt": (1024, "gpt2")}[
        path.parent.name
    ]
    assert (config.length, config.tokenizer) == (length, tokenizer)
    assert config.window_marks == (path.parent.name == "lm1b")
    if path.stem in PAPER and path.stem.startswith("bd3lm"):
        assert config.init_from == f"runs/{path.parent.name}/base"
        assert config.steps == 150_000 and config.estimator == "clipped_redraw"


def test_a_recipe_is_found_by_name_wherever_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    every = {f"{path.parent.name}/{path.stem}": path
             for name in (*SETS, "starter") for path in RECIPES.glob(f"{name}/*.yaml")}  # fmt: skip
    assert len(every) == 38 and set(recipes()) == set(every)
    Path("owt").mkdir()
    Path("owt", "bd3lm-4").mkdir()  # a run's folder is no file with options
    for name, path in every.items():
        data = ["--data", "x"] if name.startswith("starter") else []
        for typed in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
            assert parse(Path(typed), *data) == parse(path, *data), typed
    Path("owt", "bd3lm-4.yaml").write_text("steps: 7")
    assert parse(Path("owt/bd3lm-4.yaml"), "--data", "x").steps == 7, "a file wins"
    for typed in ("owt/bd3lm-5", "nosuch.yaml"):
        with pytest.raises(SystemExit) as left:
            cli.main(["train", "--config", typed])
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and f"--config {typed}: no " in told
        assert "in lm1b/ and owt/: ar, ar-base, base, bd3lm-1," in told
        assert told.endswith("; in starter/: ar, ar-alike, draft, joint\n")


@pytest.mark.parametrize("name", SETS)
def test_every_recipe_of_the_paper_sees_a_million_steps(name: str) -> None:
    for stem in PAPER:
        config = parse(RECIPES / name / f"{stem}.yaml")
        before = 850_000 if config.init_from else 0
        assert config.steps + before == (850_000 if stem == "base" else 1_000_000)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_its_configurations(name: str, kind: str) -> None:
    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 8


@pytest.mark.parametrize("name", SETS)
def test_recipes_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the recipes' own folders, so that each finds the model it starts from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    words = ["a", "billion", "words", "are", "cut", "into", "windows", "and", "masked", "again"]
    texts = [" ".join(words[(i * j) % len(words)] for j in range(1, 40)) for i in range(1, 40)]
    Path("text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    train_tokenizer(load_corpus("text.jsonl"), 280).save_pretrained("tokenizer")
    local = STAND_IN | {"data": "text.jsonl", "tokenizer": "tokenizer"}
    for path in in_order(name):
        config = replace(parse(path), **local)
        done = train(config, progress=False)
        model = load_model(done.folder)
        assert model.config.kind == config.objective
        assert model.config.block_size == config.effective_block_size
        assert 0 < done.metrics["eval_nats_per_token"] < 7


def test_the_starters_recipe_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written but for its size, on the kinds of file it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    Path("texts").mkdir()
    texts = [f"Fellow citizens, this is address number {i} of a good many. " * 8 for i in range(40)]
    for name in ("sotu", "moby_dick"):
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        Path("texts", f"{name}.jsonl").write_text(lines)
    small = [f"--{key}={value}" for key, value in STAND_IN.items() if value is not None]
    more = ["--data=texts", "--vocab_size=280", *small]
    for stem in ("ar", "ar-alike", "joint", "draft"):
        config = parse(RECIPES / "starter" / f"{stem}.yaml", *more)
        assert config.out == f"runs/starter/{stem}"
        model = load_model(train(config, progress=False).folder)
        assert not model.config.adaln
    assert model.config.block_sizes == (1, 4, 8, 16) and model.chain is not None
