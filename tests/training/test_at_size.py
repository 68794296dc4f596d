"""Long runs: any field of transformers' arguments, checkpoints that stay, what is logged."""

import json
from pathlib import Path

import pytest
import torch

import blockdiff
from blockdiff import cli
from blockdiff.errors import InputError
from blockdiff.training.arguments import _OWNED, training_arguments
from blockdiff.training.checkpoints import checkpoints
from blockdiff.training.config import TrainConfig


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("The law of the land is the law of the sea. " * 60)
    return "notes.txt"


def config(**changes):
    return TrainConfig(**{
        "data": "notes.txt", "out": "out", "steps": 6, "batch_size": 2, "length": 8,
        "vocab_size": 270, "eval_windows": 2, "report_to": "none", **changes,
    })  # fmt: skip


def arguments(**changes):
    return training_arguments(config(**changes), torch.device("cpu"))


def test_any_other_field_reaches_the_trainer():
    made = arguments(
        trainer_args=["adam_beta2=0.95", "dataloader_pin_memory=false", "optim=adafactor",
                      "run_name=a=b", "lr_scheduler_kwargs={\"x\": 1}"]
    )  # fmt: skip
    assert (made.adam_beta2, made.dataloader_pin_memory, made.run_name) == (0.95, False, "a=b")
    assert made.optim == "adafactor" and made.lr_scheduler_kwargs == {"x": 1}
    assert made.adam_beta1 == 0.9, "what is not named stays ours"


def test_from_python_they_may_be_a_mapping():
    told = config(trainer_args={"adam_beta2": 0.95, "dataloader_pin_memory": False})
    assert told.trainer_args == ["adam_beta2=0.95", "dataloader_pin_memory=false"]
    assert config(trainer_args="adam_beta2=0.95").trainer_args == ["adam_beta2=0.95"]
    assert config(trainer_args={}).trainer_args is None


@pytest.mark.parametrize("field", _OWNED)
def test_fields_of_ours_name_the_option_to_use(field):
    option = _OWNED[field]
    with pytest.raises(InputError, match=f"give `{option}`" if option else "this package decides"):
        arguments(trainer_args=[f"{field}=1"])
    assert not option or hasattr(TrainConfig(), option)


def test_every_field_we_set_is_known_as_ours():
    """What `training_arguments` passes by name cannot be passed twice."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(training_arguments))
    (call,) = (x for x in ast.walk(tree) if isinstance(x, ast.Call)
               and getattr(x.func, "id", "") == "_Arguments")  # fmt: skip
    assert {one.arg for one in call.keywords if one.arg} <= _OWNED.keys()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("adam_beta3=1", "no field 'adam_beta3'; did you mean adam_beta"),
        ("adam_beta2", "not of the form name=value"),
        ("adam_beta2=much", "invalid float value: 'much'"),
        ("optim=best", "best"),
        ("dataloader_pin_memory=perhaps", "perhaps"),
        ("max_steps=3", "give --steps"),
        ("_n_gpu=3", "no field '_n_gpu'"),
        ("adam_beta1=7", "7"),
        ("adam_epsilon=-1", "-1"),
        ("gradient_checkpointing=true", "give --checkpoint-activations"),
        ("push_to_hub=true", "this package decides it"),
        ("save_only_model=true", "this package decides it"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_text_is_read(given, said, corpus, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "no-such-file.txt", "--out", "out", "--trainer-args", given])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and said in line
    assert line.startswith("blockdiff: error: --trainer-args: ")


def test_the_run_remembers_them(corpus, capsys):
    blockdiff.train(config(trainer_args={"adam_beta2": 0.5}, steps=2), progress=False)
    assert json.loads(Path("out/run.json").read_text())["trainer_args"] == ["adam_beta2=0.5"]
    with pytest.raises(InputError, match="trainer_args"):
        blockdiff.train(config(resume=True, trainer_args={"adam_beta2": 0.9}), progress=False)
    assert blockdiff.train(TrainConfig(out="out", resume=True, steps=3), progress=False).steps == 1


def test_the_newest_checkpoints_and_every_nth_stay(corpus):
    blockdiff.train(config(save_every=1, keep_last=3, keep_every=2, steps=7), progress=False)
    kept = [folder.name.partition("-")[2] for folder in checkpoints(Path("out"))]
    assert kept == ["7", "6", "5", "4", "2"]
    # A resumed run may be told anew.
    told = TrainConfig(out="out", resume=True, steps=9, keep_last=1, keep_every=4)
    blockdiff.train(told, progress=False)
    assert [f.name.partition("-")[2] for f in checkpoints(Path("out"))] == ["9", "8", "4"]


def test_the_first_checkpoint_at_or_after_a_multiple_stays(corpus):
    blockdiff.train(config(save_every=2, keep_last=1, keep_every=3, steps=9), progress=False)
    kept = [folder.name.partition("-")[2] for folder in checkpoints(Path("out"))]
    assert kept == ["9", "6", "4"]
    with pytest.raises(InputError, match="at least 1"):
        config(keep_last=0)


def test_what_is_logged_names_the_run():
    """W&B reads `to_sanitized_dict`, TensorBoard `to_json_string`."""
    made = arguments(
        estimator="clipped", clip="0.3,0.8", schedule="cosine", data=["a.txt", "b.txt"],
        data_weights="1,3",
    )  # fmt: skip
    for told in (made.to_sanitized_dict(), json.loads(made.to_json_string())):
        assert told["blockdiff.estimator"] == "clipped" and told["blockdiff.clip"] == "0.3,0.8"
        assert told["blockdiff.schedule"] == "cosine" and "b.txt" in str(told["blockdiff.data"])
        assert told["blockdiff.data_weights"] == "1,3" and told["blockdiff.objective"] == "bd3lm"


def test_tensorboard_shows_it(corpus):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    blockdiff.train(config(report_to="tensorboard", steps=2, schedule="cosine"), progress=False)
    (folder,) = {file.parent for file in Path("out/tensorboard").glob("events*")}
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    text = found.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"blockdiff.schedule": "cosine"' in text and '"blockdiff.data": "notes.txt"' in text


def test_the_pages_commands_are_ones_there_are():
    """Every command of docs/training.md is read by the command line; the script by a shell."""
    import re
    import shutil
    import subprocess

    root = Path(__file__).parents[2]
    page = (root / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"blockdiff (train .*)$", page, re.M)
    assert len(lines) == 14
    for line in lines:
        words = line.replace("$resume", "--resume").replace("recipes/", f"{root}/recipes/").split()
        name, given = cli.parse(words)
        assert name == "train" and "out" in given.values
        given.make(TrainConfig)
    (script,) = re.findall(r"```bash\n(#!.*?)```", page, re.S)
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
