"""What was saved, sampled, measured and trained before the rooms were rebuilt is so still."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import blockdiff
from first_house.record import (
    LIKELIHOODS,
    MODELS,
    TRAINING,
    measure,
    sample,
    sampling_cases,
    train,
)

HERE = Path(__file__).parent / "first_house"
GOLDEN = json.loads((HERE / "golden.json").read_text())
SAMPLES = [(kind, name) for kind in MODELS for name in sampling_cases(kind)]
MEASURES = [(kind, name) for kind in MODELS for name in GOLDEN["likelihood"][kind]]
pytestmark = pytest.mark.filterwarnings("ignore:the model was trained with block size")


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder with the models, the run and the text, as they were when the run was begun."""
    shutil.copytree(HERE / "models", tmp_path, dirs_exist_ok=True)
    shutil.copytree(HERE / "models", tmp_path / "models")
    shutil.copytree(HERE / "run", tmp_path / "run")
    shutil.copy(HERE / "text.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("kind", "name"), SAMPLES)
def test_a_model_of_then_writes_the_same(kind, name):
    model = blockdiff.load(HERE / "models" / kind)[0]
    assert sample(model, sampling_cases(kind)[name]) == GOLDEN["sampling"][kind][name]


@pytest.mark.parametrize(("kind", "name"), MEASURES)
def test_a_model_of_then_measures_the_same(kind, name):
    model = blockdiff.load(HERE / "models" / kind)[0]
    nats = measure(model, LIKELIHOODS[name])
    assert nats == pytest.approx(GOLDEN["likelihood"][kind][name], rel=1e-5)


@pytest.mark.parametrize("name", TRAINING)
def test_training_has_the_losses_of_then(run_folder, name):
    lines = train(TRAINING[name], Path("again"))
    golden = GOLDEN["training"][name]
    assert [line.keys() for line in lines] == [line.keys() for line in golden]
    for line, then in zip(lines, golden, strict=True):
        assert line == pytest.approx(then, rel=1e-4)


def test_a_run_of_then_is_resumed(run_folder):
    def asked(steps):
        return blockdiff.TrainConfig(out="run", steps=steps, resume=True)

    assert blockdiff.train(asked(4), progress=False).steps == 0  # it was finished
    assert blockdiff.train(asked(6), progress=False).steps == 2
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    then = [line["loss"] for line in GOLDEN["training"]["bd3lm"] if "loss" in line]
    assert losses[:4] == pytest.approx(then, rel=1e-4)
    assert len(losses) == 6
    assert torch.isfinite(torch.tensor(losses)).all()
