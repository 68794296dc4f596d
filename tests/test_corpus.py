"""Which text is measured, and its figures per byte."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from blockdiff.errors import InputError
from blockdiff.evaluation import corpus as module
from blockdiff.evaluation.corpus import DEFAULTS, measure_sequences, options_of_run
from blockdiff.evaluation.options import EvaluateOptions
from blockdiff.training.config import TrainConfig
from helpers import random_tokens, tiny_model


def of_run(folder, asked, given=None, **run):
    folder.mkdir(exist_ok=True)
    record = asdict(TrainConfig(**{"out": str(folder)} | run))
    (folder / "run.json").write_text(json.dumps(record))
    return options_of_run(folder, asked, given or {})


def test_a_runs_own_text_is_opened_as_the_run_did(tmp_path):
    run = {
        "data": "d.jsonl", "seed": 5, "validation_fraction": 0.2, "text_column": "body",
        "detokenizer": "ptb", "bos": True, "eos": False, "across_documents": False,
    }  # fmt: skip
    data, options, part = of_run(tmp_path / "r", "d.jsonl", **run)
    assert (data, part, options["part"]) == ("d.jsonl", "validation", "validation")
    assert options["split_seed"] == 5 and options["validation_fraction"] == 0.2
    for name in ("text_column", "detokenizer", "bos", "eos", "across_documents"):
        assert options[name] == run[name]
    given = {"part": "train", "split_seed": 0, "bos": False, "text_column": None}
    _, told, part = of_run(tmp_path / "r", "d.jsonl", given, **run)
    assert part == "train" and told["split_seed"] == 0 and told["bos"] is False
    assert told["text_column"] == "body", "0 and false are told, None is not"


def test_another_text_and_another_model_have_the_plain_defaults(tmp_path):
    assert of_run(tmp_path / "r", "other.jsonl", data="d.jsonl", seed=5)[1] == DEFAULTS
    assert options_of_run(tmp_path, "d.jsonl", {}) == ("d.jsonl", DEFAULTS, "all")


def test_a_path_written_otherwise_is_the_same_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.txt").write_text("text")
    assert of_run(tmp_path / "r", str(tmp_path / "d.txt"), data="d.txt")[2] == "validation"
    (tmp_path / "e.txt").write_text("text")
    assert of_run(tmp_path / "r", "e.txt", data="d.txt")[2] == "all"


@pytest.mark.parametrize(
    ("run", "opened"),
    [
        ({"validation_data": "v.jsonl"}, ("v.jsonl", "train")),
        ({"validation_split": "test"}, ("d.jsonl", "test")),
    ],
)
def test_a_run_with_a_validation_text_of_its_own(tmp_path, run, opened):
    """It held out nothing of what it trained on: no fraction of that may be called validation."""
    data, options, part = of_run(tmp_path / "r", "d.jsonl", data="d.jsonl", **run)
    assert (data, options["split"], options["part"], part) == (*opened, "all", "validation")
    trained = of_run(tmp_path / "r", "d.jsonl", {"part": "train"}, data="d.jsonl", **run)
    assert (trained[0], trained[1]["split"], trained[1]["part"]) == ("d.jsonl", "train", "all")


def test_the_validation_text_itself_is_measured_whole(tmp_path):
    run = {"data": "d.jsonl", "validation_data": "v.jsonl", "detokenizer": "lm1b"}
    data, options, part = of_run(tmp_path / "r", "v.jsonl", **run)
    assert (data, options["detokenizer"], part) == ("v.jsonl", "lm1b", "all")


def test_no_such_part_is_refused_before_anything_is_opened(tmp_path):
    with pytest.raises(InputError, match="validation"):
        module.evaluate_corpus(tmp_path, EvaluateOptions("d.txt", part="held-out"))


def test_figures_per_byte_are_of_the_whole_corpus():
    """Few windows of a long corpus: their tokens are not its tokens, nor nats its bits."""

    class Packed:
        corpus_tokens, bytes, tokens, length, windows = 1000, 3000, 48, 12, 4

    model = tiny_model(vocab_size=9)
    x_0 = random_tokens(model, 4, 12)
    record = measure_sequences(model, Packed(), {"x_0": x_0}, model="m", data="d")
    measured = module.likelihood(model, x_0)
    assert record["tokens_per_byte"] == pytest.approx(1 / 3)
    assert record["nats_per_byte"] == pytest.approx(measured.nats_per_token / 3)
    assert record["bits_per_byte"] == pytest.approx(measured.nats_per_token / math.log(2) / 3)
    assert record["bits_per_byte_stderr"] == pytest.approx(measured.stderr / math.log(2) / 3)
    assert measured.stderr > 0 and torch.isfinite(measured.nats).all()
