"""Fewer bits change little: against float32, on a network that has learnt something."""

import copy
import re
from pathlib import Path

import pytest
import torch

import blockdiff
from blockdiff import objectives
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.loss import subs_nll_from_logits
from blockdiff.models.weights import Linear, _compiled_product, _widened_product, can_pack, convert
from blockdiff.noising import exact_k, stratified_noise
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions
from helpers import attend

CPU = torch.device("cpu")
TEXT = Path(__file__).parents[1].joinpath("LICENSE").read_text()


@pytest.fixture(scope="module")
def trained():
    """A network trained on the text of the licence, and windows of it: (model, x_0)."""
    letters = sorted(set(TEXT))
    ids = torch.tensor([letters.index(c) for c in TEXT])
    torch.manual_seed(0)
    config = DiTConfig(
        len(letters) + 1, 32, 4, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        cond_size=16, dropout=0.0, initial_gate=1.0,
    )  # fmt: skip
    model = DiT(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        x_0 = windows[torch.randint(len(windows), (32,), generator=generator)]
        noise = stratified_noise(32, config.layout, generator)
        maskable = objectives.maskable_positions(x_0)
        draw = exact_k(x_0, config.layout, noise, maskable, config.mask_token_id)
        (objectives.bd3lm(model, x_0, draw).sum() / maskable.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), windows[:64]


def perplexity(model, x_0):
    return blockdiff.likelihood(model, x_0, estimator="enumerate").perplexity


def test_the_trained_network_has_learnt_something(trained):
    """Well below the 30 or so of its letters' frequencies: attention is at work."""
    assert perplexity(*trained) < 20


def test_autocast_has_the_same_perplexity(trained):
    model, x_0 = trained
    exact = perplexity(model, x_0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = perplexity(model, x_0)
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.005)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.005), ("int8", 0.02)])
def test_converted_weights_have_the_same_perplexity(trained, precision, tolerance):
    model, x_0 = copy.deepcopy(trained[0]), trained[1]
    exact = perplexity(model, x_0)
    convert(model, precision, CPU)
    assert model.dtype == torch.bfloat16
    assert model.output.linear.format == ("int8" if precision == "int8" else "plain")
    rounded = perplexity(model, x_0)
    assert rounded != exact and rounded == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("int8", 0.05)])
def test_converted_weights_have_near_logits(trained, precision, tolerance):
    model, x_0 = copy.deepcopy(trained[0]), trained[1]
    x_t = x_0.masked_fill(torch.rand(x_0.shape) < 0.5, model.config.mask_token_id)
    with torch.no_grad():
        exact = model(x_t, x_0=x_0).logits
        convert(model, precision, CPU)
        rounded = model(x_t, x_0=x_0).logits.float()
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 0 < error < tolerance


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_every_precision_samples(trained, precision):
    model = copy.deepcopy(trained[0])
    convert(model, precision, CPU)
    done = generate_tokens(model, [[1], [2, 3, 4, 5, 6]], SamplingOptions(max_new_tokens=40))
    assert [len(row) for row in done.tokens] == [40, 40]


def test_the_gradient_of_a_step_in_bf16_is_near(trained):
    model, x_0 = copy.deepcopy(trained[0]), trained[1]
    noise = stratified_noise(len(x_0), model.config.layout, torch.Generator().manual_seed(3))
    maskable = objectives.maskable_positions(x_0)
    draw = exact_k(x_0, model.config.layout, noise, maskable, model.config.mask_token_id)
    gradients = []
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            nats = objectives.bd3lm(model, x_0, draw)
        nats.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    exact, rounded = gradients
    assert 0 < ((rounded - exact).norm() / exact.norm()).item() < 0.05


def test_attention_in_bf16_is_near():
    layout = BlockLayout(128, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 256, 32, generator=generator) for _ in range(3))
    exact = attend(q, k, v, layout, "two_stream")
    halves = (x.to(torch.bfloat16) for x in (q, k, v))
    rounded = attend(*halves, layout, "two_stream").float()
    assert 0 < ((rounded - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize("width", [40, 64])  # with and without torch's kernel
def test_int8_is_the_nearest_of_255_levels(width):
    torch.manual_seed(0)
    linear = Linear(width, 7)
    small = copy.deepcopy(linear)
    small.store("int8")
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    # Half a level, and bf16's rounding of the scale.
    assert ((small.dense().float() - linear.weight).abs() <= step * 0.5 + 0.01 * step * 127).all()
    assert small.stored.abs().amax(1).eq(127).all()
    x = torch.randn(3, 5, width)
    out = small(x)
    assert out.shape == (3, 5, 7) and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), linear(x), rtol=0.05, atol=0.05)


def test_packed_weights_are_the_same_weights(trained):
    """The order in memory differs, the rounding hardly."""
    model, x_0 = copy.deepcopy(trained[0]), trained[1]
    if not can_pack(CPU):
        pytest.skip("this build of torch has no packed linear maps")
    plain = copy.deepcopy(model)
    convert(plain, "bf16", CPU)
    convert(model, "bf16", CPU, few_tokens=True)
    assert model.layers[0].mlp_in.format == "packed"
    with torch.no_grad():
        expected, found = (net(x_0, x_0=x_0).logits.float() for net in (plain, model))
    assert ((found - expected).norm() / expected.norm()).item() < 0.01
    done = generate_tokens(model, [[1], [2, 3, 4, 5, 6]], SamplingOptions(max_new_tokens=40))
    assert [len(row) for row in done.tokens] == [40, 40]


@pytest.mark.parametrize("kind", ["plain", "packed", "int8"])
def test_every_format_stands_for_one_weight_and_gives_nll(trained, kind):
    """The nll of a converted model is that of its own logits; `dense` is what it multiplies by."""
    model, x_0 = copy.deepcopy(trained[0]), trained[1]
    if kind == "packed" and not can_pack(CPU):
        pytest.skip("this build of torch has no packed linear maps")
    plain = model.output.linear.weight.detach().clone()
    convert(model, "int8" if kind == "int8" else "bf16", CPU, few_tokens=kind == "packed")
    linear = model.output.linear
    assert linear.format == kind and (linear.weight is None) == (kind != "plain")
    assert linear.dense().shape == plain.shape
    torch.testing.assert_close(linear.dense().float(), plain, rtol=0.02, atol=0.02)
    at = torch.zeros_like(x_0, dtype=torch.bool)
    at[:, ::3] = True
    x_t = x_0.masked_fill(at, model.config.mask_token_id)
    with torch.no_grad():
        nll = model(x_t, x_0=x_0, at=at, targets=x_0[at]).nll
        logits = model(x_t, x_0=x_0, at=at).logits
    expected = subs_nll_from_logits(logits, x_0[at], model.config.mask_token_id)
    torch.testing.assert_close(nll, expected, rtol=0.02, atol=0.05)


def test_a_packed_model_measures_as_bf16_does(trained):
    if not can_pack(CPU):
        pytest.skip("this build of torch has no packed linear maps")
    plain, packed = (copy.deepcopy(trained[0]) for _ in range(2))
    convert(plain, "bf16", CPU)
    convert(packed, "bf16", CPU, few_tokens=True)
    expected = perplexity(plain, trained[1])
    assert perplexity(packed, trained[1]) == pytest.approx(expected, rel=0.005)


def test_the_compiled_int8_product_is_the_plain_one():
    """The way of CUDA: the weight widened inside the product, one graph for any number of rows."""
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randint(-127, 128, (7, 40)).to(torch.int8)
    scale = torch.rand(7).bfloat16()
    product = _compiled_product("eager")
    for rows in (5, 3, 2):
        expected = _widened_product(x[:rows], weight, scale)
        assert torch.equal(product(x[:rows], weight, scale), expected)


def test_an_unknown_precision_is_named(trained):
    with pytest.raises(InputError, match=re.escape("'fp8'")):
        convert(trained[0], "fp8", CPU)


def test_twelve_rows_are_the_same_alone_and_in_a_batch_in_float32(trained):
    """What docs/precision.md promises of float32 weights; it promises nothing of the others."""
    options = SamplingOptions(max_new_tokens=8, seed=3)
    prompts = [[row % 7, (row * row) % 5] for row in range(12)]
    together = generate_tokens(trained[0], prompts, options).tokens
    assert (
        generate_tokens(trained[0], prompts[::-1], options, rows=range(12)[::-1]).tokens
        == (together[::-1])
    )
    for row, prompt in enumerate(prompts):
        assert generate_tokens(trained[0], [prompt], options, rows=[row]).tokens == [together[row]]
