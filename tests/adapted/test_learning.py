"""Training from an adapted folder: the gradient, resuming, two processes."""

import math
from dataclasses import replace

import pytest
import torch
from families import (
    FEW,
    MASK,
    WORDS,
    Slow,
    adapted,
    folder_of,
    lm_of,
    tiny_with_eyes,
    tokens,
    words_tokenizer,
)
from safetensors.torch import load_file

import blockdiff
from blockdiff.errors import InputError
from blockdiff.estimators import make_estimator
from blockdiff.models.hub import load_model
from blockdiff.models.loading import adapt_folder
from blockdiff.noising import stratified_noise
from blockdiff.objectives import bd3lm, maskable_positions
from blockdiff.training.callbacks import read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train
from processes import pair


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


# the gradient


def slow_nats(slow, x_0, draw, size):
    """Each block alone after its clean prefix, one at a time: what the two streams do at once."""
    total = torch.zeros(())
    for row, (x_t, weight) in enumerate(zip(draw.x_t.tolist(), draw.weight, strict=True)):
        text = x_0[row % len(x_0)].tolist()
        for start in range(0, len(text), size):
            for i in range(start, start + size):
                if weight[i] > 0:
                    logits = slow.of_states(text[:start], [x_t[start : start + size]])[0]
                    hidden = torch.arange(logits.shape[-1]) == MASK
                    nll = -logits[i - start].masked_fill(hidden, -math.inf).log_softmax(-1)
                    total = total + weight[i] * nll[text[i]]
    return total


@pytest.mark.parametrize("prediction", ["shift", "same"])
@pytest.mark.parametrize("family", FEW)
def test_the_gradient_is_that_of_an_obvious_loss(family, prediction):
    clean = "causal" if FEW.index(family) % 2 == (prediction == "shift") else "block"
    model = adapted(family, clean=clean, prediction=prediction)
    slow = Slow(lm_of(family), clean, prediction)
    x_0, layout = tokens(2, 12), model.config.layout_of(12)
    noise = stratified_noise(2, layout, torch.Generator().manual_seed(3), draws=2)
    draw = make_estimator("exact_k")(x_0, layout, noise, maskable_positions(x_0), MASK)
    fast = bd3lm(model, x_0, draw, layout).sum()
    obvious = slow_nats(slow, x_0, draw, 4)
    assert fast.item() == pytest.approx(obvious.item(), rel=1e-4)
    fast.backward()
    obvious.backward()
    expected = dict(slow.lm.named_parameters())
    for name, own in model.lm.named_parameters():
        like = expected[name].grad
        scale = float(like.abs().max())
        torch.testing.assert_close(own.grad, like, rtol=1e-3, atol=1e-4 * scale + 1e-5, msg=name)


# runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    lines = [" ".join(WORDS[(i * j) % 12] for j in range(1, 9 + i % 7)) for i in range(1, 80)]
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with a part that no text reaches: in DDP nobody may wait for its gradients."""
    folder = tmp_path_factory.mktemp("base")
    folder_of(tiny_with_eyes(vocab_size=15), folder / "lm", words_tokenizer())
    adapt_folder(folder / "lm", folder / "adapted", block_size=4)
    return folder / "adapted"


def small(base, corpus, out, **changes):
    config = TrainConfig(
        out=str(out), data=str(corpus), init_from=str(base), tokenizer=str(base), length=16,
        block_size="4", steps=4, batch_size=4, warmup=1, lr=1e-3, ema=0.9, precision="float32",
        log_every=1, save_every=2, eval_windows=4, across_documents=False, report_to="none",
    )  # fmt: skip
    return replace(config, **changes)


def same_weights(a, b, **bounds):
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **bounds, msg=name)


@pytest.fixture(scope="module")
def finished(base, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKDIFF_CACHE", str(folder / "cache"))
        return train(small(base, corpus, folder / "run"), progress=False).folder


def test_a_run_moves_the_weights_and_leaves_a_folder_like_the_first(base, finished):
    model, tokenizer = blockdiff.load(finished)
    start = load_model(base)
    assert model.config.record() == start.config.record()
    assert tokenizer.mask_token_id == model.config.mask_token_id
    for (name, own), other in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(own, other) == ("vision" in name or "projector" in name), name


def test_a_resumed_run_is_the_uninterrupted_one(base, corpus, finished, tmp_path):
    """To the last bit, weights and their average, which the checkpoint keeps apart."""
    cut = small(base, corpus, tmp_path / "cut", steps=2, lr_schedule="constant")
    whole = train(replace(cut, out=str(tmp_path / "whole"), steps=4), progress=False).folder
    train(cut, progress=False)
    resumed = train(replace(cut, steps=4, resume=True), progress=False).folder
    same_weights(resumed, whole, rtol=0, atol=0)
    losses = [
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (resumed, whole)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_two_processes_are_one(base, corpus, finished, tmp_path):
    config = small(base, corpus, tmp_path / "two")
    words = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in vars(config).items()
        if value is not None and value != getattr(TrainConfig(), name)
    ]
    for done in pair(tmp_path / "streams", ["train", *words]):
        assert done.returncode == 0, done.stderr[-3000:]
    same_weights(tmp_path / "two", finished, rtol=1e-3, atol=1e-5)
    runs = [
        [m[key] for m in read_metrics(run / "metrics.jsonl") for key in ("loss", "grad_norm", "eval_nats_per_token") if key in m]  # noqa: E501
        for run in (finished, tmp_path / "two")
    ]  # fmt: skip
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_recomputed_activations_and_micro_batches_are_the_same_run(
    base, corpus, finished, tmp_path
):
    config = small(base, corpus, tmp_path / "other", checkpoint_activations=True, accumulate=2)
    same_weights(train(config, progress=False).folder, finished, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective": "ar"}, "objective ar` is for the package's own networks"),
        ({"objective": "sedd"}, "objective sedd` is for the package's own networks"),
        ({"compile": True}, "`compile` is for the package's own networks"),
        ({"time_conditioning": True}, "`time_conditioning` is for the package's own networks"),
        ({"length": 64}, "`length` is 64, but the model's context is 48"),
    ],
)
def test_what_an_adapted_model_is_not_trained_by(base, corpus, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(small(base, corpus, tmp_path / "run", **changes), progress=False)


def test_a_run_s_blocks_and_objective_are_the_model_s_afterwards(base, corpus, tmp_path):
    """The context stays a multiple of every block size; mdlm has a block as long as the window."""
    for name, changes, facts in (
        ("bd3lm", {"block_size": "5", "length": 15}, ("bd3lm", 5, (5,), 45)),
        ("several", {"block_size": "1,4"}, ("bd3lm", 4, (1, 4), 48)),
        ("mdlm", {"objective": "mdlm"}, ("mdlm", 16, (16,), 16)),
    ):
        done = train(
            small(base, corpus, tmp_path / name, steps=1, eval_windows=2, **changes),
            progress=False,
        )
        model, tokenizer = blockdiff.load(done.folder)
        config = model.config
        assert (config.kind, config.block_size, config.block_sizes, config.length) == facts
        assert config.objective == facts[0]
        assert math.isfinite(done.metrics["eval_nats_per_token"])
        found = blockdiff.generate(model, "w0 w1", tokenizer=tokenizer, max_new_tokens=8)
        assert found.tokens
