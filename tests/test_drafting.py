"""What drafting needs of training: prediction "shift", joint loss, chain and gated pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import blockdiff
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.estimators import make_estimator
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.gated import is_draft
from blockdiff.models.loading import adapt_folder
from blockdiff.noising import stratified_noise
from blockdiff.objectives import ar, bd3lm, maskable_positions
from blockdiff.registry import OBJECTIVES
from blockdiff.sampling.generate import generate_tokens
from blockdiff.training.config import TrainConfig
from helpers import random_masks, random_tokens, tiny_model

MASK = 8
ALL = make_estimator("clipped", clip=(1.0, 1.0))
pytestmark = pytest.mark.filterwarnings("ignore:the model was trained with block size")


def made(**settings):
    own = {"vocab_size": 9, "clean_stream": "causal", "prediction": "shift", "block_size": 4}
    return tiny_model(**own | settings)


def autoregressive(model):
    """The AR network of the same weights, without adaLN."""
    own = tiny_model(vocab_size=9, causal=True, adaln=False)
    own.load_state_dict(
        {k: x for k, x in model.state_dict().items() if not is_draft(k)}, strict=True
    )
    return own


def drawn(model, x_0, size=None, estimator="exact_k"):
    layout = model.config.layout_of(x_0.shape[1], size)
    noise = stratified_noise(len(x_0), layout, torch.Generator().manual_seed(5))
    return make_estimator(estimator)(x_0, layout, noise, maskable_positions(x_0), MASK), layout


# the configuration


def test_the_folder_tells(tmp_path):
    model = made(chain_rank=3)
    blockdiff.save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["prediction"], written["chain_rank"]) == ("shift", 3)
    opened = blockdiff.load_model(tmp_path)
    assert opened.config.layout.prediction == "shift" and opened.config.keep_first
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor)
    assert made(prediction="same").config.layout.prediction == "same"


def test_a_new_chain_changes_nothing():
    torch.manual_seed(0)
    model = DiT(DiTConfig(9, 12, 4, 16, 1, 2, 8, chain_rank=3))
    assert model.chain.previous.std() > 0.5
    assert not model.chain(torch.arange(9)).any()
    assert DiT(DiTConfig(9, 12, 4, 16, 1, 2, 8)).chain is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean_stream": "block"}, "prediction shift needs a causal clean_stream"),
        ({"time_conditioning": True}, "which knows no time"),
        ({"prediction": "next"}, "`prediction` 'next' is unknown; choose one of same, shift"),
        ({"chain_rank": -1}, "`chain_rank` is -1"),
    ],
)
def test_what_a_network_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        made(**settings)


def test_what_training_is_told():
    assert TrainConfig(objective="joint", block_size="4,8").trained_sizes == (1, 4, 8)
    for wrong, message in (
        ({"prediction": "shift"}, "`prediction` shift needs `clean` causal"),
        ({"objective": "draft", "block_size": "1,4"}, "blocks of 1 are not drafted"),
        ({"ar_weight": -1.0}, "`ar_weight` is -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig(**wrong)


# prediction "shift"


def test_blocks_of_one_are_the_ar_model():
    model = made(adaln=False)
    x_0 = random_tokens(model, 3, 12)
    expected = likelihood(autoregressive(model), x_0)
    for estimator in ("enumerate", "exact_k"):
        found = likelihood(model, x_0, estimator, draws=2, block_size=1)
        torch.testing.assert_close(found.nats, expected.nats, rtol=1e-5, atol=1e-5)
    assert (likelihood(model, x_0).nats - expected.nats).abs().min() > 0.01


@pytest.mark.parametrize("adaln", [True, False])
@pytest.mark.parametrize("size", [1, 4, 12])
@pytest.mark.parametrize("copies", [1, 2])
def test_backends_agree_in_gradients(adaln, size, copies):
    """One pass, an encoded context, every position or some: the same logits."""
    model = made(block_size=size, adaln=adaln)
    x_0 = random_tokens(model, 2, 12)
    x_t = torch.cat([random_masks(x_0, MASK, seed=seed) for seed in range(copies)])
    at = torch.rand(x_t.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    clean_at = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    clean_at[:, 0] = False
    found = []
    for backend in ("dense", "blockwise"):
        out = model(x_t, x_0=x_0, at=at, clean_at=clean_at, backend=backend).logits
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        found.append([out, *torch.autograd.grad(loss, list(model.parameters()))])
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=2e-3, atol=2e-3)
    expected = found[0][0].detach()
    assert len(expected) == at.sum() + clean_at.sum()
    with torch.no_grad():
        for backend in ("dense", "blockwise", "flex"):
            context = model.encode(x_0, backend=backend)
            other = model(x_t, context=context, at=at, clean_at=clean_at, backend=backend).logits
            torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
            whole = model(x_t, x_0=x_0, backend=backend).logits
            torch.testing.assert_close(whole[at], expected[: at.sum()], rtol=1e-4, atol=1e-5)


def test_only_what_predicts_goes_through_the_last_mlp():
    model, seen = made(), []
    model.layers[-1].mlp_in.register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape[:-1])))
    x_0 = random_tokens(model, 2, 12)
    draw, layout = drawn(model, x_0)
    bd3lm(model, x_0, draw, layout)
    assert seen == [(int(draw.masked.sum()),)]


def test_documents_and_padding():
    """Two texts in one row are two rows, where each begins a block."""
    model = made()
    x_0 = random_tokens(model, 1, 12)
    documents = torch.tensor([[0] * 8 + [1] * 4])
    draw, layout = drawn(model, x_0)
    layout = replace(layout, documents=documents)
    other = x_0.clone()
    other[:, :8] = (other[:, :8] + 1) % 8
    x_t = torch.where(draw.x_t == MASK, MASK, other)
    with torch.no_grad():
        one = model(draw.x_t, x_0=x_0, layout=layout).logits[:, 9:]
        two = model(x_t, x_0=other, layout=layout).logits[:, 9:]
    torch.testing.assert_close(one, two)


# the joint loss


@pytest.mark.parametrize("estimator", ["exact_k", "paired"])
def test_joint_is_both_losses_in_one_pass(estimator):
    model = made(adaln=False)
    x_0 = random_tokens(model, 3, 12)
    draw, layout = drawn(model, x_0, estimator=estimator)
    found = OBJECTIVES["joint"].nats(model, x_0, draw, layout)
    torch.testing.assert_close(found["bound"], bd3lm(model, x_0, draw, layout))
    exact = ar(autoregressive(model), x_0, maskable_positions(x_0))
    torch.testing.assert_close(found["ar"], exact, rtol=1e-4, atol=1e-5)
    single, layout = drawn(model, x_0, 1)
    alone = OBJECTIVES["joint"].nats(model, x_0, single, layout)
    assert list(alone) == ["bound"]  # which is AR's
    torch.testing.assert_close(alone["bound"], exact, rtol=1e-4, atol=1e-5)


def test_joint_counts_what_the_loss_counts():
    model = made()
    x_0 = random_tokens(model, 1, 12)
    layout = model.config.layout_of(12)
    counts = torch.arange(12)[None] % 3 == 0
    noise = stratified_noise(1, layout, torch.Generator().manual_seed(0))
    draw = make_estimator("exact_k")(x_0, layout, noise, counts, MASK)
    found = OBJECTIVES["joint"].nats(model, x_0, draw, layout)
    assert (found["ar"] > 0).nonzero()[:, 1].tolist() == [3, 6, 9]


def test_a_plain_trainer_has_the_same_loss():
    model = made(objective="joint", block_sizes=(4,)).eval()
    x_0 = random_tokens(model, 2, 12)
    torch.manual_seed(3)
    loss = model(x_0, labels=x_0).loss
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    layout = model.config.layout_of(12)
    noise = stratified_noise(2, layout, torch.Generator().manual_seed(seed))
    draw = make_estimator("exact_k")(x_0, layout, noise, maskable_positions(x_0), MASK)
    parts = OBJECTIVES["joint"].nats(model, x_0, draw, layout)
    torch.testing.assert_close(loss, sum(part.sum() for part in parts.values()) / 22)


# the drafter


@pytest.mark.parametrize("prediction", ["shift", "same"])
def test_draft_is_cross_entropy_with_what_ar_says(prediction):
    model = made(chain_rank=3, adaln=False, prediction=prediction)
    x_0 = random_tokens(model, 2, 12)
    layout = model.config.layout_of(12)
    draw = ALL(x_0, layout, stratified_noise(2, layout, torch.Generator()), maskable_positions(x_0), MASK)  # fmt: skip  # noqa: E501
    found = OBJECTIVES["draft"].nats(model, x_0, draw, layout)
    with torch.no_grad():
        if prediction == "shift":
            own = autoregressive(model)
            true = own(x_0).logits.roll(1, 1)
        else:
            ones = torch.full_like(x_0, MASK)
            true = model(ones, x_0=x_0, layout=replace(layout, block_size=1)).logits
        x_t = torch.where(draw.x_t == x_0, x_0, MASK)
        logits = model(x_t, x_0=x_0).logits
    total, mass, count = 0.0, 0.0, 0
    for row in range(2):
        for i in range(1, 12):
            if prediction == "shift" and i % 4 == 0:
                continue
            z = logits[row, i] + model.chain(x_0[row, i - 1])
            q, p = (x[:MASK].double().softmax(-1) for x in (z, true[row, i]))
            total -= float((p * q.log()).sum())
            mass += float(torch.minimum(p, q).sum())
            count += 1
    assert float(found["draft"].sum()) / 22 == pytest.approx(total / count, rel=1e-5)
    assert float(found["accepted"].sum()) / 22 == pytest.approx(mass / count, rel=1e-5)


def test_the_chain_is_only_a_drafter_s():
    """Likelihood and samples are those of the network without it."""
    model = made(chain_rank=3)
    x_0 = random_tokens(model, 3, 12)
    options = blockdiff.SamplingOptions(max_new_tokens=9, seed=1, stop="none")

    def told():
        nats = likelihood(model, x_0).nats
        return nats, generate_tokens(model, [[1]], options).tokens

    before = told()
    model.chain = None
    after = told()
    assert torch.equal(before[0], after[0]) and before[1] == after[1]


TEXT = "The law of the land is the law, and the people keep the law of the land. "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A plain causal language model with its tokenizer, and the same with a drafter; a text."""
    folder = tmp_path_factory.mktemp("gated")
    tokenizer = train_tokenizer([TEXT * 20], 270)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, initializer_range=0.2,
        )
    )  # fmt: skip
    lm.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    adapt_folder(folder / "plain", folder / "base", block_size=4, draft=4, chain_rank=8)
    (folder / "text.txt").write_text(TEXT * 300)
    return folder / "base"


def run(base, out, **options):
    config = {
        "data": str(base.parent / "text.txt"), "out": str(out), "init_from": str(base),
        "objective": "draft", "length": 16, "steps": 40, "batch_size": 4, "lr": 1e-2, "warmup": 4,
        "ema": 0.5, "save_every": 20, "eval_windows": 4, "report_to": "none",
        "precision": "float32", "log_every": 5,
    }  # fmt: skip
    return blockdiff.train(TrainConfig(**config | options), progress=False)


def test_a_drafter_trains_beside_a_model_that_stays_what_it_is(base, tmp_path):
    """Bit for bit: its weights, the clean stream's logits, and AR's; acceptance rises."""
    done = run(base, tmp_path / "run")
    one, other = (load_file(f / "model.safetensors") for f in (base, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    before, after = blockdiff.load_model(base), blockdiff.load_model(tmp_path / "run")
    x_0 = torch.randint(200, (2, 16), generator=torch.Generator().manual_seed(1))
    x_t = torch.full_like(x_0, before.config.mask_token_id)
    single = before.config.layout_of(16, 1)
    with torch.no_grad():
        exact = [model(x_t, x_0=x_0, layout=single).logits for model in (before, after)]
        noised = [model(x_t, x_0=x_0).logits[:, 1::4] for model in (before, after)]
        keys = [torch.stack(model.encode(x_0).keys) for model in (before, after)]
    assert torch.equal(*exact) and torch.equal(*keys)
    assert (noised[0] - noised[1]).abs().max() > 0.1
    changed = {
        name
        for (name, a), (_, b) in zip(
            before.named_parameters(), after.named_parameters(), strict=True
        )
        if not torch.equal(a, b)
    }
    assert changed == {name for name, _ in after.named_parameters() if is_draft(name)}
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    accepted = [line["part_accepted"] for line in lines if "part_accepted" in line]
    assert accepted[-1] > accepted[0] + 0.1
    assert done.metrics["eval_accepted"] == pytest.approx(accepted[-1], abs=0.1)


def test_acceptance_is_validated_in_the_blocks_that_the_run_drafts(base, tmp_path):
    """Which need not be the model's own, of four tokens."""
    of_two, of_four = (
        run(base, tmp_path / str(size), steps=1, lr=1e-9, block_size=size).metrics["eval_accepted"]
        for size in (2, 4)
    )
    assert of_two != pytest.approx(of_four, abs=1e-3)


def test_the_cache_gates_by_column(base, tmp_path):
    """Beside a finished block, which stays clean, a noised one: as in one uncached pass."""
    run(base, tmp_path / "run")
    model = blockdiff.load_model(tmp_path / "run")
    x_0 = torch.randint(200, (1, 12), generator=torch.Generator().manual_seed(2))
    x_t = x_0.clone()
    x_t[:, 9:] = model.config.mask_token_id
    cache = model.new_cache(1, 12, 4)
    cache.admit(np.array([0]), np.array([4]), np.array([12]))
    with torch.no_grad():
        expected = model(x_t, x_0=x_0).logits[0, 8:]
        context = model.encode(x_0[:, :4])
        cache.append(np.array([0]), context.keys, context.values, np.array([4]))
        x = torch.cat([x_0[:, 4:8], x_t[:, 8:]], 1)
        mask = cache.visible(4, 4, np.array([True]), clean_stream="causal")
        found = model.decode(
            x, torch.arange(4, 12)[None], cache, torch.arange(3, 7), mask=mask, clean=4
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adapted", "dit"])
def test_a_draft_run_is_the_same_resumed(base, tmp_path, kind):
    start, options = base, {}
    if kind == "dit":
        start, options = tmp_path / "joint", {"chain_rank": 8}
        run(base, start, init_from=None, objective="joint", block_size="2,4", vocab_size=270,
            steps=2, ema=0.5)  # fmt: skip
        assert blockdiff.load_model(start).config.block_sizes == (1, 2, 4)
    name = "draft.safetensors" if kind == "adapted" else "model.safetensors"
    whole, half = tmp_path / "whole", tmp_path / "half"
    run(base, whole, init_from=str(start), steps=4, save_every=2, **options)
    run(base, half, init_from=str(start), steps=2, save_every=2, **options)
    again = TrainConfig(out=str(half), steps=4, resume=True)
    blockdiff.train(again, progress=False, given={"steps", "out", "resume"})
    one, other = load_file(whole / name), load_file(half / name)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=1e-5)
    kept = load_file(whole / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert kept and all(map(is_draft, kept))
    model = blockdiff.load_model(whole)
    before = blockdiff.load_model(start)
    assert model.config.objective == before.config.objective
    assert model.config.block_sizes == before.config.block_sizes
    same = [name for name, p in before.named_parameters() if torch.equal(p, dict(model.named_parameters())[name])]  # fmt: skip  # noqa: E501
    assert not any(map(is_draft, same)) and len(same) > 5


def test_a_joint_run_logs_both(base, tmp_path):
    done = run(base, tmp_path / "run", init_from=None, objective="joint", block_size="2,4",
               vocab_size=270, steps=10)  # fmt: skip
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss_2", "loss_4", "part_ar"} <= set().union(*lines)
    model = blockdiff.load_model(tmp_path / "run")
    assert (model.config.prediction, model.config.clean_stream) == ("shift", "causal")
    assert done.metrics["eval_ar"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": None}, "name one as `init_from`"),
        ({"init_from": "starter", "length": 16}, "has nothing that drafts: give `chain_rank`"),
    ],
)
def test_bad_input(base, tmp_path, changes, message):
    if changes["init_from"] == "starter":
        model, words = blockdiff.load("starter")
        model.chain = None
        changes = changes | {"init_from": str(tmp_path / "without")}
        model.config.chain_rank = 0
        blockdiff.save_model(model, tmp_path / "without", words)
    with pytest.raises(InputError, match=message):
        run(base, tmp_path / "run", **changes)


def test_joint_on_an_adapted_model(base, tmp_path):
    """Its clean stream is the base model's: AR's loss is that of the model itself."""
    lm = LlamaForCausalLM.from_pretrained(base.parent / "plain")
    model = blockdiff.adapt(lm, mask_token_id=MASK, block_size=4)
    x_0 = torch.randint(20, 200, (2, 16), generator=torch.Generator().manual_seed(1))
    found = OBJECTIVES["joint"].nats(model, x_0, *drawn(model, x_0))
    torch.testing.assert_close(found["bound"], bd3lm(model, x_0, *drawn(model, x_0)))
    own = LlamaForCausalLM.from_pretrained(base.parent / "plain")(x_0).logits
    own[..., MASK] = -torch.inf
    exact = -own.log_softmax(-1)[:, :-1].gather(-1, x_0[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found["ar"][:, 1:], exact, rtol=1e-4, atol=1e-4)
    adapt_folder(base.parent / "plain", tmp_path / "adapted", block_size=8)
    run(base, tmp_path / "run", init_from=str(tmp_path / "adapted"), objective="joint", steps=2)
    assert blockdiff.load_model(tmp_path / "run").config.block_sizes == (1, 8)
    with pytest.raises(InputError, match="train it with `objective` draft"):
        run(base, tmp_path / "other", objective="joint")


def test_a_draft_needs_a_clean_stream_that_stays(base):
    lm = LlamaForCausalLM.from_pretrained(base.parent / "plain")
    with pytest.raises(InputError, match="needs prediction shift and a causal clean stream"):
        blockdiff.adapt(lm, mask_token_id=3, block_size=4, prediction="same", draft=4)
