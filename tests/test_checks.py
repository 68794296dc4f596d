"""Numbers from outside, each at both ends: refused by name, or right, and 0 is 0."""

import ast
import contextlib
import inspect
import io
import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import blockdiff
from blockdiff.apps.benchmark.options import BenchmarkOptions
from blockdiff.apps.demo import demo
from blockdiff.apps.reproduction.pool import reproduce
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation.judge import load_judge
from blockdiff.evaluation.options import EvaluateOptions, SampleOptions, VarianceOptions
from blockdiff.evaluation.variance import variance
from blockdiff.evaluation.zero_shot import zero_shot
from blockdiff.sampling.options import SamplingOptions
from blockdiff.training.config import TrainConfig
from blockdiff.watch import watch
from helpers import tiny_model

HOSTILE = [1e20, math.inf, -math.inf, math.nan, 1e-320, 10**30, 10**400, -1, True, "3", [3], 2.5j,
           np.float32("nan")]  # fmt: skip
OPTIONS = (TrainConfig, SamplingOptions, BenchmarkOptions)
# What is right though it looks wrong: so hot that all is equally likely, so cold that it is greedy.
RIGHT = {("temperature", str(x)) for x in (1e20, 10**30, 1e-320)} | {
    *((name, str(1e-320)) for name in ("threshold", "margin", "edit_threshold", "cfg_scale")),
    *(("entropy_bound", str(x)) for x in (1e-320, 1e20, 10**30)),
    ("top_p", str(1e-320)),
    ("delay", str(1e-320)),
}
ZERO_MEANS_SOMETHING = {
    TrainConfig: {"ar_weight", "chain_rank", 
        "initial_shift", "minutes", "warmup", "weight_decay", "max_grad_norm", "dropout", "ema",
        "seed", "workers", "eval_every", "keep_every", "eval_windows",
    },
    SamplingOptions: {
        "temperature", "seed", "threshold", "margin", "entropy_bound", "edit_threshold",
        "cfg_scale",
    },
    BenchmarkOptions: {"dropout"},
}  # fmt: skip


def is_number(annotation: object) -> bool:
    return str(annotation).removesuffix(" | None") in ("int", "float", "<class 'int'>")


def refused(name: str, call: Callable[..., object], **given: object) -> None:
    with pytest.raises(InputError, match=f"`{name}`") as error:
        call(**given)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


NUMBERS = [(kind, f.name) for kind in OPTIONS for f in fields(kind) if is_number(f.type)]


def test_the_numbers_are_found() -> None:
    assert len(NUMBERS) > 30


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_a_number_of_the_options(kind: type, name: str) -> None:
    for value in HOSTILE:
        if kind is not SamplingOptions or (name, str(value)) not in RIGHT:
            refused(name, kind, **{name: value})
    if name not in ZERO_MEANS_SOMETHING[kind]:
        refused(name, kind, **{name: 0})
    else:
        assert getattr(kind(**{name: 0}), name) == 0
    whole = next(f for f in fields(kind) if f.name == name).type != "float"
    if whole and "float" not in str(next(f for f in fields(kind) if f.name == name).type):
        refused(name, kind, **{name: 2.5})


@pytest.mark.parametrize("kind", OPTIONS)
def test_words_of_the_options(kind: type) -> None:
    for field in fields(kind):
        if not is_number(field.type):
            for value in (3, 2.5, [], b"x", *(() if "None" in str(field.type) else (None,))):
                refused(field.name, kind, **{field.name: value})
        if "bool" not in str(field.type) and str(field.type)[0].isupper():
            refused(field.name, kind, **{field.name: "no such thing"})


def test_numbers_of_numpy_become_pythons_own() -> None:
    options = SamplingOptions(max_new_tokens=np.int64(3), temperature=np.float32(0.5))
    assert type(options.max_new_tokens) is int and type(options.temperature) is float


class Opened(Exception):
    """Work has begun."""


@pytest.fixture
def nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*given: object, **named: object) -> None:
        raise Opened

    for name in ("corpus.load_in", "variance.load"):
        monkeypatch.setattr(f"blockdiff.evaluation.{name}", begin)
    monkeypatch.setattr("blockdiff.evaluation.samples.read_samples", begin)
    monkeypatch.setattr("blockdiff.evaluation.judge.AutoConfig.from_pretrained", begin)
    monkeypatch.setattr("blockdiff.apps.reproduction.pool.prepared", begin)
    monkeypatch.setattr("blockdiff.apps.demo.plain_console", begin)
    monkeypatch.setattr("blockdiff.data.tokenizers.tokenizers.Tokenizer", begin)


MODEL = tiny_model(vocab_size=9, length=16)
X_0 = torch.ones(16, 16, dtype=torch.int64)
CORPUS = ("length", "windows", "split_seed", "validation_fraction")
# What is called, numbers that its signature does not tell, and those of which 0 is one.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...], set[str]]] = {
    "evaluate_corpus": (partial(EvaluateOptions, "x.txt"), (), {"windows", "seed", "split_seed"}),
    "measure_corpus": (partial(VarianceOptions, "x.txt"), (), {"seed", "split_seed"}),
    "zero_shot": (
        partial(zero_shot, "starter", "ptb"), ("length", "windows", "draws", "seed"),
        {"windows", "seed"},
    ),
    "measure_samples": (
        partial(SampleOptions, "x.json", tokenizer="starter"), (), {"seed", "split_seed"}
    ),
    "load_judge": (partial(load_judge, "starter"), (), set()),
    "train_tokenizer": (partial(train_tokenizer, ["a text"]), (), set()),
    "likelihood": (partial(blockdiff.likelihood, MODEL, X_0), (), {"seed"}),
    "variance": (partial(variance, MODEL, X_0, "exact_k"), (), {"seed"}),
    "generate": (partial(blockdiff.generate, MODEL, [[1]], max_new_tokens=1), (), set()),
    "demo": (partial(demo, "demo"), (), {"seed"}),
    "reproduce": (
        partial(reproduce, out="mini", data="x.txt", smoke=True, overwrite=False), ("workers",),
        set(),
    ),
    "watch": (
        partial(watch, [], None, [1], 0, 4, console=Console(file=io.StringIO())), (), {"delay"}
    ),
}  # fmt: skip
# Options of sampling, tested above, and what `watch` is told of the steps: no numbers of the call.
OTHERS = {
    "generate": {field.name for field in fields(SamplingOptions)},
    "watch": {"mask_token_id", "block_size"},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_of_a_function(
    name: str, nothing_opens: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, more, with_zero = CALLS[name]
    known = {p.name for p in inspect.signature(call).parameters.values() if is_number(p.annotation)}
    names = (known | {*more}) - OTHERS.get(name, set())
    assert names
    for number in names:
        for value in (*HOSTILE, 0):
            if (number, str(value)) not in RIGHT and (value != 0 or number not in with_zero):
                refused(number, call, **{number: value})
    for number in with_zero - {"delay"}:
        with contextlib.suppress(Opened):
            call(**{number: 0})
    assert not list(tmp_path.iterdir())


NUMBER_NAMES = {name for _, name in NUMBERS} | {
    "window", "windows", "draws", "samples", "delay", "words", "workers", "minutes", "cpu_count",
    "batch_size", "max_position_embeddings", "reach",
}  # fmt: skip


def defaults_by_or(code: str) -> list[str]:
    """The names of what `x or default` is written of, as a value and not as a condition."""
    tree = ast.parse(code)
    conditions = {
        id(node.test) for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp | ast.While)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            words = {getattr(x, "id", getattr(x, "attr", None)) for x in ast.walk(node.values[0])}
            words |= {x.value for x in ast.walk(node.values[0]) if isinstance(x, ast.Constant)}
            plain = not any(isinstance(x, ast.Compare | ast.Not) for x in ast.walk(node))
            last = node.values[-1]
            none = isinstance(last, ast.Constant) and last.value is None
            if id(node) not in conditions and plain and not none:
                found += sorted(map(str, words & NUMBER_NAMES))
    return found


def test_no_number_has_a_default_of_the_word_or() -> None:
    """`x or default` takes 0 for what was left out."""
    assert defaults_by_or("a = options.block_size or 4") == ["block_size"]
    assert defaults_by_or("f(os.cpu_count() or 1)") == ["cpu_count"]
    assert defaults_by_or("if seed or steps: pass") == []
    for path in Path(blockdiff.__file__).parent.rglob("*.py"):
        assert not defaults_by_or(path.read_text(encoding="utf-8")), path
