import pytest
import torch
from transformers import AutoModel

import blockdiff
from blockdiff import objectives
from blockdiff.attention.blockwise import _chunks
from blockdiff.attention.flex import _layout_mask
from blockdiff.attention.masks import dense_mask
from blockdiff.device import SHAPES
from blockdiff.errors import InputError
from blockdiff.estimators import paired
from blockdiff.evaluation.likelihood import addressed_noise, likelihood
from blockdiff.layout import BlockLayout
from blockdiff.models.config import PRESETS, DiTConfig
from blockdiff.models.dit import DiT, _rope_table
from blockdiff.models.loss import subs_nll_from_logits
from blockdiff.noising import exact_k
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.training.ema import Average
from helpers import Operators, random_masks, random_tokens, tiny_model

BACKENDS = pytest.mark.parametrize("backend", ["dense", "blockwise", "flex"])


@pytest.fixture
def model():
    return tiny_model(vocab_size=9, length=12, block_size=4)


def pair(model, rows=2, length=12, seed=0):
    x_0 = random_tokens(model, rows, length, seed=seed)
    return x_0, random_masks(x_0, model.config.mask_token_id, seed=seed)


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def inputs_of(module, run):
    """Shapes of what goes into a module while `run` runs."""
    shapes = []
    handle = module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        run()
    handle.remove()
    return shapes


# sizes


def test_presets_have_the_sizes_they_promise():
    """About 1M and 5M without embeddings and output map; the paper's 170M with all of it."""
    inner, whole = {}, {}
    for preset in PRESETS:
        with torch.device("meta"):
            model = DiT(DiTConfig(vocab_size=50_258, **PRESETS[preset]))
        whole[preset] = sum(p.numel() for p in model.parameters())
        outside = model.embedding.weight.numel() + model.output.linear.weight.numel()
        inner[preset] = whole[preset] - outside
    assert inner["nano"] == pytest.approx(1e6, rel=0.2)
    assert inner["micro"] == pytest.approx(5e6, rel=0.1)
    assert whole["small"] == pytest.approx(170e6, rel=0.01)


@pytest.mark.parametrize(
    "bad",
    [{"hidden_size": 30}, {"block_size": 5}, {"vocab_size": 0}, {"dropout": 1.0},
     {"mask_token_id": 9}, {"num_hidden_layers": 0}],
)  # fmt: skip
def test_sizes_that_do_not_fit(bad):
    with pytest.raises(InputError):
        DiTConfig(**({"vocab_size": 9, "length": 12, "block_size": 4} | bad))


def test_kinds():
    kinds = {4: "bd3lm", 1: "bd3lm", 12: "mdlm"}
    for size, kind in kinds.items():
        assert DiTConfig(9, 12, size).kind == kind
    ar = DiTConfig(9, 12, 4, causal=True)
    assert (ar.kind, ar.block_size, ar.adaln) == ("ar", 1, False)


def test_initial_weights():
    """Residual maps smaller by √(2M), modulations constant, layers the identity at gate 0."""
    config = DiTConfig(50, 12, 4, hidden_size=64, num_hidden_layers=8, num_attention_heads=4)
    layer = DiT(config).layers[3]
    for linear, std in [(layer.qkv, 0.02), (layer.mlp_in, 0.02)] + [
        (residual, 0.02 / 4) for residual in (layer.attention_out, layer.mlp_out)
    ]:
        assert linear.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not layer.modulation.weight.any() and not layer.modulation.bias.any()
    h = torch.randn(1, 12, 64)
    sigma = torch.zeros(1, 1, config.cond_size)
    assert torch.equal(layer.update(h, torch.randn(1, 12, 64), layer.fold(sigma)), h)
    config.initial_gate, config.initial_shift = 1.0, 0.5
    bias = DiT(config).layers[3].modulation.bias.view(6, 64)
    assert (bias[[2, 5]] == 1).all() and not bias[[1, 3, 4]].any()
    assert bias[0].std().item() == pytest.approx(0.5, rel=0.4)


# the output layer


@BACKENDS
def test_chosen_positions_have_the_same_logits(model, backend):
    x_0, x_t = pair(model)
    at = x_t == model.config.mask_token_id
    whole = logits(model, x_t, x_0=x_0, backend=backend)
    assert torch.equal(logits(model, x_t, x_0=x_0, at=at, backend=backend), whole[at])
    with torch.no_grad():
        nll = model(x_t, x_0=x_0, at=at, targets=x_0[at], backend=backend).nll
    torch.testing.assert_close(nll, subs_nll_from_logits(whole, x_0, 8)[at])


def test_only_chosen_positions_go_through_the_output_layer(model):
    """Logits are of the masked tokens: no [B, L, V] or [B, 2L, V], forward or backward."""
    x_0, x_t = pair(model)
    at = x_t == model.config.mask_token_id
    for backend in ("dense", "blockwise"):
        with Operators() as seen:
            model(x_t, x_0=x_0, at=at, targets=x_0[at], backend=backend).nll.sum().backward()
        wide = {shape for shape in seen.shapes if shape[-1:] == (9,)}
        assert wide <= {(int(at.sum()), 9), (9,), (16, 9)}  # logits; bias, weight transposed
        with Operators() as seen:
            logits(model, x_t, x_0=x_0, at=at, backend=backend)
        assert (int(at.sum()), 9) in seen.shapes and (2, 12, 9) not in seen.shapes
    assert inputs_of(model.output.linear, lambda: model.encode(x_0)) == []


def test_the_clean_stream_ends_at_the_last_layers_keys_and_values(model):
    """What comes after the last attention sees L tokens a sequence, not 2L; `dense` sees all."""
    x_0, x_t = pair(model)
    for backend, tokens in (("blockwise", 12), ("dense", 24)):
        shapes = inputs_of(model.layers[-1].mlp_in, lambda b=backend: model(x_t, x_0, backend=b))
        assert shapes == [(2, tokens, 16)]
        shapes = inputs_of(model.layers[0].mlp_in, lambda b=backend: model(x_t, x_0, backend=b))
        assert shapes == [(2, 24, 16)]


# the condition


def test_constant_modulations_are_computed_once(model):
    x_0, x_t = pair(model)
    for backend in ("dense", "blockwise"):
        for module in (model.layers[0].modulation, model.output.modulation):
            shapes = inputs_of(module, lambda backend=backend: model(x_t, x_0=x_0, backend=backend))
            assert shapes and all(shape[:-1] in ((1, 1), (1,)) for shape in shapes)


def test_sigma_is_ignored_without_time_conditioning(model):
    x_0, x_t = pair(model)
    assert torch.equal(
        logits(model, x_t, x_0=x_0, sigma=torch.tensor([3.0, 0.1])), logits(model, x_t, x_0=x_0)
    )


@BACKENDS
def test_time_conditioning_by_row_and_by_block(backend):
    model = tiny_model(vocab_size=9, time_conditioning=True)
    x_0, x_t = pair(model)
    run = lambda sigma: logits(model, x_t, x_0=x_0, sigma=sigma, backend=backend)  # noqa: E731
    by_row = run(torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(by_row, run(torch.tensor([[0.5] * 3, [2.0] * 3])))
    torch.testing.assert_close(by_row[:1], run(torch.tensor([0.5, 0.5]))[:1])
    assert (by_row - run(torch.tensor([2.0, 2.0])))[0].abs().max() > 1e-3
    # The noised blocks do not see one another: σ of a block changes its own logits only.
    changed = run(torch.tensor([[0.5, 1.0, 0.5], [2.0] * 3]))
    differs = (changed - by_row).abs().amax(-1) > 1e-5
    expected = torch.zeros(2, 12, dtype=torch.bool)
    expected[0, 4:8] = True
    assert torch.equal(differs, expected)
    none = run(None)
    torch.testing.assert_close(none, run(torch.zeros(2)))


def test_the_clean_stream_has_no_noise():
    """σ reaches the noised stream only, so the two-stream pass and the encoded one agree."""
    model = tiny_model(vocab_size=9, time_conditioning=True)
    x_0, x_t = pair(model)
    sigma = torch.rand(2, 3) * 3
    dense, blockwise = (
        logits(model, x_t, x_0=x_0, sigma=sigma, backend=backend)
        for backend in ("dense", "blockwise")
    )
    torch.testing.assert_close(dense, blockwise, rtol=1e-4, atol=1e-5)


# who sees what


@BACKENDS
def test_draws_share_one_clean_text(backend):
    """R · B noised rows, draw-major, are R separate passes."""
    model = tiny_model(vocab_size=9, time_conditioning=True)
    x_0 = random_tokens(model, 2, 12)
    copies = [random_masks(x_0, 8, seed=seed) for seed in range(3)]
    sigma = torch.rand(6, 3)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3])
    layout = BlockLayout(12, 4, documents=documents)
    together = logits(
        model, torch.cat(copies), x_0=x_0, sigma=sigma, layout=layout, backend=backend
    )
    for r, x_t in enumerate(copies):
        alone = logits(
            model, x_t, x_0=x_0, sigma=sigma[2 * r : 2 * r + 2], layout=layout,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(together[2 * r : 2 * r + 2], alone, rtol=1e-4, atol=1e-5)


def changed_positions(before, after):
    return (before != after).any(-1).any(0).nonzero().flatten().tolist()


@BACKENDS
def test_noised_blocks_see_earlier_clean_blocks_and_themselves(model, backend):
    x_0, x_t = pair(model)
    before = logits(model, x_t, x_0=x_0, backend=backend)
    for block in range(3):
        own = slice(4 * block, 4 * block + 4)
        y_0, y_t = x_0.clone(), x_t.clone()
        y_0[:, own] = (x_0[:, own] + 1) % 8
        y_t[:, own] = (x_t[:, own] + 1) % 9
        clean = changed_positions(before, logits(model, x_t, x_0=y_0, backend=backend))
        noised = changed_positions(before, logits(model, y_t, x_0=x_0, backend=backend))
        assert clean == list(range(4 * block + 4, 12)), "x_0 of a block: later blocks only"
        assert noised == list(range(4 * block, 4 * block + 4)), "x_t of a block: itself only"


@BACKENDS
def test_mdlm_sees_everything(backend):
    model = tiny_model(vocab_size=9, block_size=12)
    _, x_t = pair(model)
    y_t = x_t.clone()
    y_t[:, 5] = (x_t[:, 5] + 1) % 9
    before, after = (logits(model, x, backend=backend) for x in (x_t, y_t))
    assert changed_positions(before, after) == list(range(12))


@BACKENDS
def test_ar_is_causal(backend):
    model = tiny_model(vocab_size=9, causal=True)
    x_0, _ = pair(model)
    y_0 = x_0.clone()
    y_0[:, 5] = (x_0[:, 5] + 1) % 8
    before, after = (logits(model, x, backend=backend) for x in (x_0, y_0))
    assert changed_positions(before, after) == list(range(5, 12))


def test_positions_matter(model):
    """Without RoPE a swap of two tokens would not be seen by the rest of their block."""
    x_0, x_t = pair(model)
    x_0[:, 0], x_0[:, 1] = 1, 2
    swapped = x_0.clone()
    swapped[:, 0], swapped[:, 1] = 2, 1
    before, after = (logits(model, x_t, x_0=x) for x in (x_0, swapped))
    assert (before - after)[:, 4:].abs().max() > 1e-3


def test_another_block_size_than_trained(model):
    x_0, x_t = pair(model)
    other = tiny_model(vocab_size=9, length=12, block_size=2)
    other.load_state_dict(model.state_dict())
    of_two = logits(model, x_t, x_0=x_0, layout=BlockLayout(12, 2))
    assert torch.equal(of_two, logits(other, x_t, x_0=x_0))


def test_shorter_texts_than_trained(model):
    x_0, x_t = pair(model)
    short = logits(model, x_t[:, :8], x_0=x_0[:, :8])
    torch.testing.assert_close(short, logits(model, x_t, x_0=x_0)[:, :8], rtol=1e-4, atol=1e-5)


# folders


@pytest.mark.parametrize(
    "settings", [{}, {"causal": True}, {"block_size": 12, "time_conditioning": True}]
)
def test_a_saved_model_comes_back_exactly(settings, tmp_path):
    model = tiny_model(**{"vocab_size": 9, "eos_token_id": 2, "clip": (0.25, 0.75)} | settings)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for load in (blockdiff.load_model, AutoModel.from_pretrained, DiT.from_pretrained):
        again = load(tmp_path)
        assert isinstance(again, DiT) and not again.training
        for name in ("kind", "layout", "eos_token_id", "mask_token_id", "clip", "keep_first"):
            assert getattr(again.config, name) == getattr(model.config, name)
        ours, theirs = model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("objective", ["ar", "bd3lm", "mdlm", "sedd", "paired"])
def test_what_sampling_cached_can_be_trained_on(objective):
    """Tensors kept from inside `inference_mode` could not take part in a backward pass."""
    kinds = {
        "ar": {"causal": True},
        "mdlm": {"block_size": 16},
        "sedd": {"block_size": 16, "time_conditioning": True, "score": True},
    }
    model = tiny_model(vocab_size=9, length=16, **kinds.get(objective, {}))
    for function in (_rope_table, dense_mask, _chunks, _layout_mask):
        function.cache_clear()
    prompt = random_tokens(model, 16).tolist()
    sampled = prompt[:8] if objective == "sedd" else prompt
    generate_tokens(model, [sampled], SamplingOptions(max_new_tokens=4))
    x_0 = torch.tensor([prompt])
    with torch.inference_mode():
        likelihood(model, x_0, "exact_k", draws=2)
        for backend in ("dense", "flex"):
            model(x_0, x_0=None if model.config.block_size == 16 else x_0, backend=backend)
    maskable = objectives.maskable_positions(x_0)
    if objective == "ar":
        nats = objectives.ar(model, x_0, maskable)
    else:
        layout = model.config.layout
        noise = addressed_noise(torch.arange(1), layout, 0)
        make = paired if objective == "paired" else exact_k
        draw = make(x_0, layout, noise, maskable, model.config.mask_token_id)
        nats = objectives.bd3lm(model, x_0, draw)
    nats.sum().backward()
    assert all(p.grad is not None for p in model.embedding.parameters())


def test_a_copy_of_a_compiled_model_is_its_own():
    """The average of a compiled model follows no raw weight, and its dropout is off."""
    model = tiny_model(vocab_size=9, length=16)
    for layer in model.layers:
        layer.dropout = 0.5
    model.train()
    model.compile_layers(backend="eager")
    average = Average(model, 0.9)
    average.eval()
    x_0 = random_tokens(model, 2, 16)
    model(x_0, x_0=x_0)
    before = average.module(x_0, x_0=x_0).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(average.module(x_0, x_0=x_0).logits, before)


def test_compiled_layers_meet_many_shapes_and_never_fall_back(caplog):
    """torch gives a function up after 8 kinds of input, here 2: one process soon has more."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        model = tiny_model(length=12, num_hidden_layers=1)
        model.compile_layers(backend="eager")
        for rows in (1, 2, 3):
            x_0, x_t = pair(model, rows)
            model(x_t, x_0=x_0)
            with torch.no_grad():
                model(x_t, x_0=x_0)
        assert torch._dynamo.config.recompile_limit == SHAPES
    assert "recompile_limit" not in caplog.text
    torch._dynamo.reset()


def test_a_layer_runs_through_its_forward():
    """So that hooks fire: FSDP2, activation checkpointing and compilation rest on them."""
    model = tiny_model(vocab_size=9, length=16)
    x_0 = random_tokens(model, 2, 16)
    seen = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *unused, i=i: seen.append(i))
    model(x_0, x_0=x_0)
    model.encode(x_0)
    generate_tokens(model, [x_0[0, :5].tolist()], SamplingOptions(max_new_tokens=1))
    assert seen[:4] == [0, 1, 0, 1] and len(seen) > 4


def test_chosen_positions_are_found_once_a_pass(model):
    """Each time, a GPU would be waited for: the host must know how many there are."""
    x_0, x_t = pair(model)
    at = x_t == 8
    targets = x_0[at]
    model(x_t, x_0=x_0)  # masks are kept
    for training in (True, False):
        with torch.set_grad_enabled(training), Operators() as seen:
            out = model(x_t, x_0=x_0, at=at, targets=targets)
            if training:
                out.nll.sum().backward()
        assert seen.waits() == ["nonzero"]
