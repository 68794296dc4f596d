"""Training as a user runs it: what a run leaves behind, and that a kill changes nothing."""

import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import blockdiff
from blockdiff import objectives
from blockdiff.errors import InputError, RunStopped
from blockdiff.evaluation.likelihood import addressed_noise
from blockdiff.models.dit import DiT
from blockdiff.models.loss import subs_nll_from_logits
from blockdiff.noising import clipped
from blockdiff.training.callbacks import read_metrics
from blockdiff.training.checkpoints import (
    COMPLETE,
    checkpoints,
    damage,
    newest_checkpoint,
    remove_unfinished,
)
from blockdiff.training.clipping import best_clip, clip_grid, clip_variances
from blockdiff.training.config import TrainConfig
from blockdiff.training.data import prepare_data
from blockdiff.training.run import train
from blockdiff.training.stored import merge_resumed
from blockdiff.training.trainer import BlockDiffusionTrainer
from helpers import random_tokens, tiny_model
from processes import command

WORDS = "the block of a text is masked and then filled in one token after another by the network"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = WORDS.split()
    lines = [
        json.dumps({"text": " ".join(words[(i * j) % len(words)] for j in range(1, 60))})
        for i in range(1, 40)
    ]
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


def small(corpus: Path, out: Path, **changes: object) -> TrainConfig:
    """Seconds of training; dropout and accumulation on, since resuming must restore both."""
    config = TrainConfig(
        out=str(out),
        data=str(corpus),
        vocab_size=280,
        length=32,
        block_size=4,
        steps=12,
        batch_size=4,
        accumulate=2,
        warmup=2,
        dropout=0.1,
        ema=0.9,
        precision="float32",
        log_every=3,
        save_every=4,
        eval_windows=4,
        report_to="none",
    )
    return replace(config, **changes)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["loss"]) for m in read_metrics(folder / "metrics.jsonl") if "loss" in m]


def test_a_run_leaves_a_model_that_loads_and_has_learned(corpus: Path, tmp_path: Path) -> None:
    config = small(
        corpus, tmp_path / "run", steps=40, lr=3e-3, dropout=0.0, save_every=100,
        report_to="tensorboard",
    )  # fmt: skip
    done = train(config, progress=False)
    model, tokenizer = blockdiff.load(done.folder)
    assert model.config.kind == "bd3lm" and model.config.block_size == 4
    assert model.config.mask_token_id == tokenizer.mask_token_id == len(tokenizer) - 1
    first, last = losses(done.folder)[0][1], losses(done.folder)[-1][1]
    assert last < 0.8 * first, (first, last)
    # What was validated is what was saved: the averaged weights.
    metrics = [m for m in read_metrics(done.folder / "metrics.jsonl") if "eval_perplexity" in m]
    assert metrics[-1]["eval_perplexity"] == pytest.approx(done.metrics["eval_perplexity"])
    assert done.tokens_seen == 40 * 4 * 32
    assert list((done.folder / "tensorboard").glob("events*"))
    stored = json.loads((done.folder / "run.json").read_text())
    assert stored["steps"] == 40 and stored["data"] == str(corpus)


def words_of(config: TrainConfig) -> list[str]:
    """`train` and the options that are not at their default, as they are typed."""
    given = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in vars(config).items()
        if value is not None and value != getattr(TrainConfig(), name)
    ]
    return ["train", *given]


def signalled_in_step_6(number: int) -> None:
    """This process's training sends itself a signal, once, in its sixth step."""
    step, sent = BlockDiffusionTrainer.training_step, []

    def sends(self: BlockDiffusionTrainer, *given: object, **named: object) -> torch.Tensor:
        if self.state.global_step == 5 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return step(self, *given, **named)

    BlockDiffusionTrainer.training_step = sends


@pytest.mark.parametrize("objective", ["bd3lm", "ar"])
def test_killed_and_resumed_equals_uninterrupted(
    corpus: Path, tmp_path: Path, objective: str
) -> None:
    """SIGKILL between two checkpoints; the loss curve and every weight come out the same."""
    whole = train(small(corpus, tmp_path / "whole", objective=objective), progress=False).folder
    killed = tmp_path / "killed"
    words = words_of(small(corpus, killed, objective=objective))
    died = command(tmp_path / "died", words, partial(signalled_in_step_6, signal.SIGKILL))
    assert died.returncode == -signal.SIGKILL
    newest = newest_checkpoint(killed)
    assert newest is not None and newest.name == "checkpoint-4"
    resumed = command(tmp_path / "resumed", ["train", f"--out={killed}", "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert losses(killed) == losses(whole)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (killed, whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_half_written_checkpoint_is_not_resumed_from(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(small(corpus, out), progress=False)
    newest = newest_checkpoint(out)
    assert newest is not None and newest.name == "checkpoint-12"
    (newest / COMPLETE).unlink()
    remove_unfinished(out)
    older = newest_checkpoint(out)
    assert older is not None and older.name == "checkpoint-8"
    assert not newest.exists()


def test_ctrl_c_while_saving_leaves_the_earlier_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    real = Trainer._save_optimizer_and_scheduler

    def interrupted(self: Trainer, folder: str) -> None:
        if folder.endswith("checkpoint-8"):
            raise KeyboardInterrupt
        real(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", interrupted)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(small(corpus, out), progress=False)
    whole = newest_checkpoint(out)
    assert whole is not None and whole.name == "checkpoint-4"
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", real)
    train(small(corpus, out, resume=True), progress=False)
    uninterrupted = train(small(corpus, tmp_path / "other"), progress=False)
    assert losses(out) == losses(uninterrupted.folder)


def test_accumulation_changes_the_masks_but_not_the_data(corpus: Path, tmp_path: Path) -> None:
    """AR draws no masks: cut into micro-batches or not, a step is the same."""
    runs = [
        train(
            small(corpus, tmp_path / str(n), objective="ar", accumulate=n, dropout=0.0, steps=6),
            progress=False,
        )
        for n in (1, 4)
    ]
    one, four = (load_file(run.folder / "model.safetensors") for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], four[name], atol=1e-4, rtol=1e-3, msg=name)


def test_bd3lm_from_ar_starts_as_the_ar_network(corpus: Path, tmp_path: Path) -> None:
    """Taking AR's weights under open adaLN gates computes what AR computed."""
    from blockdiff.training.building import build_model

    ar = train(small(corpus, tmp_path / "ar", objective="ar"), progress=False).folder
    start, tokenizer = blockdiff.load(ar)
    config = small(corpus, tmp_path / "bd", init_from=str(ar))
    model = build_model(config, tokenizer, start).eval()
    x = torch.randint(0, 200, (2, 32))
    # One causal stream through both: the clean stream at L' = 1.
    layout = blockdiff.BlockLayout(32, 1)
    ours, theirs = model.encode(x, layout), start.encode(x, layout)
    for a, b in zip(ours.keys, theirs.keys, strict=True):
        torch.testing.assert_close(a, b)
    # And under a causal clean stream with any blocks.
    config = replace(config, clean="causal")
    model = build_model(config, tokenizer, start).eval()
    for a, b in zip(model.encode(x).keys, theirs.keys, strict=True):
        torch.testing.assert_close(a, b)
    done = blockdiff.load_model(train(config, progress=False).folder).config
    assert (done.kind, done.clean_stream, done.block_size) == ("bd3lm", "causal", 4)


def test_a_run_carries_weights_and_their_average_on(corpus: Path, tmp_path: Path) -> None:
    """The last step's weights and the average differ; a warm-up's first step has rate 0."""
    base = train(small(corpus, tmp_path / "base", objective="mdlm", ema=0.999), progress=False)
    checkpoint = newest_checkpoint(base.folder)
    assert checkpoint is not None
    name = "layers.0.qkv.weight"
    raw, averaged = (load_file(f / "model.safetensors")[name] for f in (checkpoint, base.folder))
    assert not torch.equal(raw, averaged)
    fine = small(corpus, tmp_path / "fine", init_from=str(base.folder), steps=1, ema=0.999)
    done = train(fine, progress=False).folder
    after = newest_checkpoint(done)
    assert after is not None
    assert torch.equal(load_file(after / "model.safetensors")[name], raw)
    # The average goes on from 12 updates: d = 13/22 in ema ← d·ema + (1 − d)·weights
    moved = load_file(done / "model.safetensors")[name]
    # All of it is in the checkpoint: the run goes on where its base is gone.
    base.folder.rename(tmp_path / "away")
    longer = train(replace(fine, steps=2, resume=True), progress=False).folder
    assert not torch.equal(load_file(longer / "model.safetensors")[name], moved)
    torch.testing.assert_close(moved, averaged + (raw - averaged) * 9 / 22)


def test_mdlm_and_padding_and_every_estimator_train(corpus: Path, tmp_path: Path) -> None:
    for estimator in ("paired", "bernoulli", "clipped"):
        config = small(
            corpus, tmp_path / estimator, steps=2, objective="mdlm", estimator=estimator,
            clip="0.3,0.8" if estimator == "clipped" else None, across_documents=False,
        )  # fmt: skip
        model = blockdiff.load_model(train(config, progress=False).folder)
        assert model.config.kind == "mdlm"
        assert model.config.clip == ([0.3, 0.8] if estimator == "clipped" else None)


def test_sedd_and_d3pm_train_and_are_measured(corpus: Path, tmp_path: Path) -> None:
    sedd = train(small(corpus, tmp_path / "sedd", objective="sedd"), progress=False)
    model = blockdiff.load_model(sedd.folder)
    assert model.config.kind == "sedd" and model.config.time_conditioning and model.config.score
    assert sedd.metrics["eval_nats_per_token"] < 6
    d3pm = small(corpus, tmp_path / "d3pm", objective="mdlm", estimator="d3pm", timesteps=8)
    timed = train(replace(d3pm, time_conditioning=True), progress=False)
    assert blockdiff.load_model(timed.folder).config.kind == "mdlm"


def test_the_clip_of_least_variance_is_searched_for(corpus: Path, tmp_path: Path) -> None:
    """After each validation; logged; a killed and resumed run draws from the same clips."""
    config = small(
        corpus, tmp_path / "whole", estimator="clipped", clip="auto", eval_every=4, log_every=4
    )
    train(config, progress=False)
    lines = [m for m in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "clip_beta" in m]
    assert len(lines) >= 3
    for line in lines:
        assert (round(line["clip_beta"], 2), round(line["clip_omega"], 2)) in clip_grid(4)
    stored = blockdiff.load_model(tmp_path / "whole").config.clip
    assert stored == [lines[-1]["clip_beta"], lines[-1]["clip_omega"]]
    train(replace(config, out=str(tmp_path / "cut"), steps=8), progress=False)
    train(replace(config, out=str(tmp_path / "cut"), resume=True, steps=12), progress=False)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_clip_search_finds_the_least_variance() -> None:
    model = tiny_model(vocab_size=9, length=16, block_size=4)
    x_0 = random_tokens(model, 64, 16)
    found = clip_variances(model, x_0, seed=0)
    assert [(c.beta, c.omega) for c in found] == clip_grid(4)
    assert len(found) == 1 + 11 + 9 + 7 + 5 + 3
    assert best_clip(found).variance == min(c.variance for c in found)
    # One of them by hand, the slow way round: one pass over the whole, dense.
    layout = model.config.layout
    noise = addressed_noise(torch.arange(64), layout, 0)
    maskable = objectives.maskable_positions(x_0)
    draw = clipped(x_0, layout, noise, maskable, 8, 0.2, 0.8)
    with torch.no_grad():
        nll = subs_nll_from_logits(model(draw.x_t, x_0=x_0, backend="dense").logits, x_0, 8)
    by_block = (nll * draw.weight).view(64, 4, 4).sum(-1) / maskable.view(64, 4, 4).sum(-1)
    ours = next(c for c in found if (c.beta, c.omega) == (0.2, 0.8))
    assert ours.variance == pytest.approx(by_block.var().item(), rel=1e-4)


def test_the_average_is_saved_not_the_last_weights(corpus: Path, tmp_path: Path) -> None:
    with_ema = train(small(corpus, tmp_path / "ema", ema=0.999), progress=False).folder
    without = train(small(corpus, tmp_path / "none", ema=0.0), progress=False).folder
    assert losses(with_ema) == losses(without)
    a, b = (load_file(f / "model.safetensors")["output.linear.weight"] for f in (with_ema, without))
    assert not torch.equal(a, b)
    newest = newest_checkpoint(with_ema)
    assert newest is not None
    assert torch.equal(a, load_file(newest / "ema.safetensors")["output.linear.weight"])
    assert torch.equal(b, load_file(newest / "model.safetensors")["output.linear.weight"])


def test_compiled_layers_train_to_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    from blockdiff.training.building import build_model

    tokenizer = blockdiff.load(
        train(small(corpus, tmp_path / "run", steps=1), progress=False).folder
    )[1]
    config = small(corpus, tmp_path / "x", dropout=0.0)
    torch.manual_seed(0)
    plain = build_model(config, tokenizer, None)
    compiled = build_model(config, tokenizer, None)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_layers()
    x = torch.randint(0, 200, (2, 32))
    for model in (plain, compiled):
        model(x, x_0=x).logits.square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_minutes_end_a_run_that_can_be_resumed(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "run", minutes=1e-6, save_every=100)
    done = train(config, progress=False)
    assert done.tokens_seen == 4 * 32, "one step, which is when the clock is looked at"
    whole = train(small(corpus, tmp_path / "whole"), progress=False)
    resumed = train(replace(config, minutes=0.0, resume=True, save_every=4), progress=False)
    assert resumed.tokens_seen == whole.tokens_seen
    ours, theirs = (load_file(run.folder / "model.safetensors") for run in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_size": 5}, "does not divide"),
        ({"steps": 0}, "at least 1"),
        ({"length": -4}, "at least 1"),
        ({"lr": 0.0}, "above 0"),
        ({"objective": "sed"}, "choose one of"),
        ({"estimator": "clipped"}, "needs `clip`"),
        ({"estimator": "clipped", "clip": "0.9,0.1"}, "must satisfy"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"batch_size": 4, "accumulate": 3}, "equal"),
        ({"minutes": -1.0}, "at least 0"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(TrainConfig(), **changes)


def test_an_occupied_folder_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(small(corpus, out, steps=1), progress=False)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="`resume`"):
        train(small(corpus, out, steps=1), progress=False)
    # Even with --overwrite nothing is lost before the new input is known to be good.
    with pytest.raises(InputError, match="less than a batch"):
        train(small(corpus, out, batch_size=100_000, overwrite=True, accumulate=1), progress=False)
    assert (out / "model.safetensors").read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds no run"):
        train(small(corpus, foreign, overwrite=True), progress=False)
    assert (foreign / "thesis.tex").exists()


def test_a_resumed_run_keeps_its_shape(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(small(corpus, out, steps=2), progress=False)
    asked = TrainConfig(out=str(out), resume=True, steps=4)
    assert merge_resumed(asked).steps == 4
    assert merge_resumed(asked).length == 32
    with pytest.raises(InputError, match="leave the option out"):
        merge_resumed(replace(asked, length=64))
    with pytest.raises(InputError, match="holds no run"):
        merge_resumed(TrainConfig(out=str(tmp_path / "nothing"), resume=True))


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_of_padded_windows_are_the_batch(
    corpus: Path, tmp_path: Path, accumulate: int
) -> None:
    """Padding makes micro-batches unequal in tokens: each token counts the same all the same."""
    whole = small(corpus, tmp_path / "whole", steps=5, across_documents=False, dropout=0.0)
    parts = replace(whole, out=str(tmp_path / "parts"), accumulate=accumulate)
    one, other = (
        load_file(train(config, progress=False).folder / "model.safetensors")
        for config in (whole, parts)
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_last_validation_is_of_the_saved_model(
    corpus: Path, tmp_path: Path, ema: float
) -> None:
    """In the run's own precision, bf16; and after a resume."""
    config = small(corpus, tmp_path / "run", steps=2, ema=ema, precision="bf16")
    train(config, progress=False)
    again = train(replace(config, steps=4, resume=True), progress=False)
    model = blockdiff.load_model(again.folder)
    windows = prepare_data(replace(config, resume=True)).validation
    with torch.autocast("cpu", torch.bfloat16):
        measured = blockdiff.likelihood(model, windows["x_0"], draws=config.eval_draws)
    assert again.metrics["eval_nats_per_token"] == pytest.approx(measured.nats_per_token, abs=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_recomputed_activations_change_no_run(
    corpus: Path, tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout included: it is drawn again from the same state."""
    compile_layers = DiT.compile_layers
    monkeypatch.setattr(DiT, "compile_layers", lambda model: compile_layers(model, "eager"))
    runs = [
        train(
            small(corpus, tmp_path / str(again), dropout=0.0 if compiled else 0.3,
                  checkpoint_activations=again, compile=compiled and again),
            progress=False,
        ).folder
        for again in (False, True)
    ]  # fmt: skip
    assert losses(runs[0])
    for (step, plain), (same_step, found) in zip(*map(losses, runs), strict=True):
        assert step == same_step and found == pytest.approx(plain, rel=1e-5)


def test_a_run_that_diverges_stops_and_keeps_what_was_finite(corpus: Path, tmp_path: Path) -> None:
    config = small(
        corpus, tmp_path / "run", lr=10.0, weight_decay=1000.0, warmup=0, save_every=1, log_every=1
    )
    with pytest.raises(RunStopped, match=r"not finite (at|after) step \d") as stopped:
        train(config, progress=False)
    assert stopped.value.exit_code == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for folder in checkpoints(tmp_path / "run"):
        assert damage(folder) is None
        for file in folder.glob("*.safetensors"):
            assert all(bool(x.isfinite().all()) for x in load_file(file).values()), file


DAMAGE = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit": lambda path: path.write_bytes(
        bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
    ),
}


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(small(corpus, tmp_path_factory.mktemp("whole") / "run"), progress=False).folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    finished: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = newest_checkpoint(finished)
    assert newest is not None
    names = sorted(path.name for path in newest.iterdir())
    assert {"complete", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(names)
    for number, name in enumerate(names):
        if (kind, name) == ("gone", "complete"):
            continue  # that is what an interrupted one looks like
        run = tmp_path / str(number)
        shutil.copytree(finished, run)
        DAMAGE[kind](run / "checkpoints" / newest.name / name)
        older = newest_checkpoint(run, say=True)
        assert older is not None and older.name == "checkpoint-8"
        assert newest.name in capsys.readouterr().err
        DAMAGE[kind](older / "model.safetensors")
        with pytest.raises(InputError, match="no whole checkpoint left"):
            newest_checkpoint(run)


def test_folders_that_are_no_checkpoints_are_left_alone(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("checkpoint-best", "checkpoint-", "checkpoint-7x", "notes"):
        (run / "checkpoints" / name).mkdir()
    remove_unfinished(run)
    newest = newest_checkpoint(run)
    assert newest is not None and newest.name == "checkpoint-12"
    assert {p.name for p in (run / "checkpoints").iterdir()} >= {"checkpoint-best", "checkpoint-7x"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_after_a_checkpoint(
    corpus: Path, tmp_path: Path, finished: Path, number: signal.Signals
) -> None:
    """And the command it prints goes on to the very weights of the run that was not stopped."""
    out = tmp_path / "stopped run"
    words = words_of(small(corpus, out))
    stopped = command(tmp_path / "stopped", words, partial(signalled_in_step_6, number))
    assert stopped.returncode == 128 + number, stopped.stderr
    advice = stopped.stderr.strip().splitlines()[-1].partition("continue with: ")[2]
    first, *rest = shlex.split(advice)
    assert first == "blockdiff"
    assert command(tmp_path / "resumed", rest).returncode == 0
    whole, resumed = ((f / "model.safetensors").read_bytes() for f in (finished, out))
    assert whole == resumed


def test_without_a_terminal_a_line_a_log(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small(corpus, tmp_path / "run", log_every=5))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/12", "5/12", "8/12", "10/12", "12/12"]
    assert all("loss" in line and "tokens/s" in line and "left" in line for line in lines)


def test_at_one_token_a_block_the_search_finds_the_tuned_schedule() -> None:
    """The paper's: every token masked. The only other candidate is no clip at all."""
    model = tiny_model(vocab_size=9, length=16, block_size=1)
    found = clip_variances(model, random_tokens(model, 64, 16), seed=0)
    assert [(c.beta, c.omega) for c in found] == [(0.0, 1.0), (1.0, 1.0)]
    assert (best_clip(found).beta, best_clip(found).omega) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["os", "all", "torch", "nosuch.thing", "tensorboard,os"])
def test_a_reporter_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="`report_to`"):
        train(TrainConfig(out=str(tmp_path / "run"), report_to=name), progress=False)
    assert not (tmp_path / "run").exists()
