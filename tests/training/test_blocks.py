"""Several block sizes in one run: which step has which, and what is told of each."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import blockdiff
from blockdiff import cli
from blockdiff.errors import InputError
from blockdiff.plots import loss_plot
from blockdiff.training.blocks import block_size_of
from blockdiff.training.callbacks import read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train
from processes import pair


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    Path("notes.txt").write_text("The law of the land is the law of the sea. " * 120)


def small(out="out", **changes):
    return TrainConfig(**{
        "data": "notes.txt", "out": out, "steps": 8, "batch_size": 4, "length": 16, "warmup": 1,
        "vocab_size": 270, "eval_windows": 4, "report_to": "none", "block_size": "1,4,8", "seed": 6,
        "log_every": 1, "save_every": 4, "ema": 0.9, "precision": "float32", **changes,
    })  # fmt: skip


def words_of(config):
    return ["train", *(f"--{name}={value}" for name, value in vars(config).items()
                       if value is not None and value != getattr(TrainConfig(), name))]  # fmt: skip


def losses(folder):
    """Step → its losses, one of them by block size."""
    lines = read_metrics(Path(folder) / "metrics.jsonl")
    return {m["step"]: {k: x for k, x in m.items() if k.startswith("loss")}
            for m in lines if "loss" in m}  # fmt: skip


# -- which step has which -------------------------------------------------------------------------


def test_sizes_come_as_often_as_their_weights_say():
    config = TrainConfig(block_size="8,1,4", block_weights="3,1,2", steps=10)
    assert config.block_sizes == (1, 4, 8) and config.effective_block_size == 8
    assert config.block_shares == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    drawn = Counter(block_size_of(config, step) for step in range(6000))
    for size, share in ((1, 1 / 6), (4, 1 / 3), (8, 1 / 2)):
        assert abs(drawn[size] / 6000 - share) < 4 * (share * (1 - share) / 6000) ** 0.5
    equal = TrainConfig(block_size=[1, 4, 8])
    assert equal.block_size == "1,4,8" and equal.block_shares == pytest.approx([1 / 3] * 3)


def test_the_draw_is_of_seed_and_step():
    config = TrainConfig(block_size="1,4")
    first = [block_size_of(config, step) for step in range(64)]
    assert first == [block_size_of(replace(config, lr=1.0, steps=9), step) for step in range(64)]
    assert first != [block_size_of(replace(config, seed=1), step) for step in range(64)]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"block_size": 8}, {1: 3, 2: 3, 4: 3, 8: 3}),
        ({"block_size": "2,8"}, {2: 4, 4: 4, 8: 4}),
        ({"block_size": 4, "block_weights": "1,1,2"}, {1: 3, 2: 3, 4: 6}),
        ({"block_size": "8,4,2"}, {2: 4, 4: 4, 8: 4}),
        ({"block_size": 1}, {1: 12}),
    ],
)
def test_a_growing_size_doubles_in_equal_parts(options, parts):
    config = TrainConfig(grow=True, steps=12, **options)
    seen = [block_size_of(config, step) for step in range(12)]
    assert seen == sorted(seen) and Counter(seen) == parts
    assert config.trained_sizes == (max(parts),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block_size": "1,3"}, "`block_size` 3 does not divide `length` 128"),
        ({"block_size": "1,x"}, "several like 1,4,16"),
        ({"block_size": "4,4"}, "different numbers"),
        ({"block_size": "0,4"}, "at least 1"),
        ({"block_size": 4.5}, "whole number"),
        ({"block_size": True}, "whole number"),
        ({"block_size": []}, "different numbers"),
        ({"block_size": "1,4", "block_weights": "1"}, r"one for each block size \(1, 4\)"),
        ({"block_size": "1,4", "block_weights": "1,0"}, "above 0"),
        ({"block_weights": "1"}, "`block_weights` needs several"),
        ({"block_size": 12, "length": 24, "grow": True}, "from 1 it does not come to 12"),
        ({"block_size": "1,4", "objective": "mdlm"}, "`block_size`: the models of `objective`"),
        ({"grow": True, "objective": "ar"}, "`grow`: the models of `objective` ar"),
        ({"block_size": "1,4", "estimator": "clipped", "clip": "auto"}, "`clip` auto"),
    ],
)
def test_sizes_that_make_no_run(options, said):
    with pytest.raises(InputError, match=said):
        TrainConfig(**options)


def test_on_the_command_line_it_is_one_line(capsys):
    refused = {"4,x": "--block-size is '4,x'", "4,6": "--block-size 6 does not divide --length 128"}
    for sizes, said in refused.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--block-size", sizes])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1


# -- a run ----------------------------------------------------------------------------------------


def test_the_model_knows_its_sizes_and_the_log_each_ones_loss(text, recwarn):
    done = train(small(), progress=False)
    model, _ = blockdiff.load(done.folder)
    assert model.config.block_size == 8 and model.config.block_sizes == (1, 4, 8)
    assert model.config.to_dict()["block_sizes"] in ((1, 4, 8), [1, 4, 8])
    recwarn.clear()
    for size in (1, 4, 8):
        assert model.config.choose_block_size(size) == size
    assert not recwarn.list
    with pytest.warns(UserWarning, match="with block size 1, 4, 8, not 2"):
        model.config.choose_block_size(2)
    found = losses(done.folder)
    for step, named in found.items():
        own = f"loss_{block_size_of(small(), step - 1)}"
        assert named.keys() == {"loss", own} and named[own] == pytest.approx(named["loss"])
    assert len({key for named in found.values() for key in named}) == 4, "every size had a step"
    assert json.loads((done.folder / "run.json").read_text())["block_size"] == "1,4,8"
    labels = loss_plot({"training": read_metrics(done.folder / "metrics.jsonl")}).axes[0]
    names = [one.get_text() for one in labels.get_legend().get_texts()]
    assert names[:3] == [f"training loss, L' = {size}" for size in (1, 4, 8)]


def test_a_line_averages_each_sizes_own_steps(text):
    each = losses(train(small(), progress=False).folder)
    whole = losses(train(small("other", log_every=4), progress=False).folder)
    for last in (4, 8):
        own = [each[step] for step in range(last - 3, last + 1)]
        for key, mean in whole[last].items():
            values = [line[key] for line in own if key in line]
            assert mean == pytest.approx(sum(values) / len(values))


@pytest.mark.parametrize("options", [{}, {"grow": True, "block_size": 4, "accumulate": 2}])
def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(text, options):
    whole = train(small("whole", **options), progress=False).folder
    cut = small("cut", **options)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        from blockdiff.training.trainer import BlockDiffusionTrainer

        step = BlockDiffusionTrainer.training_step
        patch.setattr(
            BlockDiffusionTrainer, "training_step",
            lambda self, *given, **named: killed() if self.state.global_step == 6
            else step(self, *given, **named),
        )  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            train(cut, progress=False)
    train(replace(cut, resume=True), progress=False)
    assert losses("cut") == losses(whole)
    ours, theirs = (load_file(Path(f) / "model.safetensors") for f in ("cut", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_take_the_steps_of_one(text, tmp_path):
    config = small("one", dropout=0.0)
    train(config, progress=False)
    for done in pair(tmp_path / "streams", words_of(replace(config, out="two"))):
        assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = losses("two"), losses("one")
    assert ours.keys() == theirs.keys() and len(theirs) == 8
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-4), step


def test_recomputed_activations_change_nothing(text):
    plain, again = (
        losses(train(small(str(on), checkpoint_activations=on), progress=False).folder)
        for on in (False, True)
    )
    assert plain.keys() == again.keys()
    for step in plain:
        assert again[step] == pytest.approx(plain[step], rel=1e-5)


def test_more_steps_move_a_growing_size_and_say_so(text, capsys):
    config = small(grow=True, block_size=4, steps=4)
    train(config, progress=False)
    assert blockdiff.load_model("out").config.block_sizes == (4,)
    train(TrainConfig(out="out", resume=True, steps=8), progress=False, given={"steps"})
    assert "the block size goes from 4 to 2 at step 4" in capsys.readouterr().err


def test_the_progress_line_has_each_loss(text, capsys):
    train(small(steps=3))
    assert "nats (L' 8: " in capsys.readouterr().err
