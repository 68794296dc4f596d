"""What holds of every family: tiny random models, text longer than their sliding windows."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from families import CONTEXT, FAMILIES, MASK, UNSUITABLE, adapted, lm_of, tiny, tokens
from transformers import AutoModelForCausalLM

import blockdiff
from blockdiff.errors import InputError
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.adapting import adapt
from blockdiff.models.loss import subs_nll_from_logits
from blockdiff.models.passes import Unsuitable
from blockdiff.models.probe import _close
from blockdiff.models.weights import convert
from blockdiff.sampling.generate import generate_tokens
from blockdiff.training.parallel import recompute_activations
from helpers import random_masks

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
# Unlike conventions, so that both of each are seen with every family.
TWO = pytest.mark.parametrize("clean, prediction", [("causal", "shift"), ("block", "same")])
LENGTH, SIZE = 16, 4


def pair(rows=2, length=LENGTH):
    x_0 = tokens(rows, length)
    return x_0, random_masks(x_0, MASK)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@EVERY_FAMILY
def test_blocks_of_one_are_the_model_itself(family):
    """Logits, nll without the mask token, and the likelihood, which is then exact."""
    lm = lm_of(family)
    lm.set_attn_implementation("eager")  # the default of some leaves a soft cap out
    x_0 = tokens(2, CONTEXT)
    with torch.no_grad():
        own = lm(input_ids=x_0).logits
    model = adapt(lm, mask_token_id=MASK, block_size=SIZE)
    layout = model.config.layout_of(CONTEXT, 1)
    x_t = torch.full_like(x_0, MASK)  # nothing noised is read
    with torch.no_grad():
        for context in (None, model.encode(x_0, layout)):
            clean = x_0 if context is None else None
            found = model(x_t, clean, context=context, layout=layout).logits
            close(found[:, 1:], own[:, :-1])
    nll = subs_nll_from_logits(own[:, :-1], x_0[:, 1:], MASK)
    with pytest.warns(UserWarning, match="trained with block size 4, not 1"):
        close(likelihood(model, x_0, block_size=1).nats.float(), nll.sum(1))


@EVERY_FAMILY
@TWO
def test_who_sees_whom(family, clean, prediction):
    """A clean token changes later blocks only, a noised one the rest of its own block."""
    model = adapted(family, clean=clean, prediction=prediction)
    x_0, x_t = (x[:1] for x in pair())

    def changed(x_0, x_t, base):
        moved = (model(x_t, x_0).logits - base).abs().amax(-1) > 1e-6
        return moved[0].nonzero().flatten().tolist()

    with torch.no_grad():
        base = model(x_t, x_0).logits
        for position in (1, 6, 15):
            block = position // SIZE
            first = block * SIZE
            other = x_0.clone()
            other[:, position] = (other[:, position] + 1) % MASK
            later = list(range(first + SIZE, LENGTH))
            found = changed(other, x_t, base)
            assert set(found) <= set(later)
            # A window may hide it from the far ones, and from the next block's end.
            assert set(later[:2]) <= set(found) if position != 1 else found[:1] == later[:1]
            other = x_t.clone()
            other[:, position] = torch.where(other[:, position] == MASK, 3, MASK)
            # Under "shift" the clean stream predicts the first, but that of the whole text.
            whole = list(range(first, first + SIZE))
            kept = prediction == "same" or first == 0
            assert changed(x_0, other, base) == (whole if kept else whole[1:])


@EVERY_FAMILY
@TWO
def test_decoding_with_the_cache_is_the_forward_pass(family, clean, prediction):
    """A finished block beside the noised one behind it, as the sampler runs them."""
    length = 24
    model = adapted(family, clean=clean, prediction=prediction)
    x_0, x_t = pair(length=length)
    with torch.no_grad():
        expected = model(x_t, x_0, backend="dense").logits
    rows, sizes = np.arange(2), np.full(2, SIZE)
    cache = model.new_cache(2, length, SIZE)
    cache.admit(rows, sizes, np.full(2, length))
    shift = int(prediction == "shift")
    with torch.no_grad():
        context = model.encode(x_0[:, :SIZE], model.config.layout_of(SIZE))
        cache.append(rows, context.keys, context.values, sizes)
        for start in range(2 * SIZE, length, SIZE):
            span = torch.arange(start - SIZE, start + SIZE)
            x = torch.cat([x_0[:, span[:SIZE]], x_t[:, span[SIZE:]]], 1)
            # What predicts the block: its own columns, or those one before.
            wanted = torch.arange(2)[:, None] * len(span) + SIZE - shift + torch.arange(SIZE)
            seen = cache.visible(SIZE, SIZE, np.full(2, True), clean_stream=clean)
            found = model.decode(
                x, span.expand(2, -1), cache, wanted.flatten(), mask=seen, clean=SIZE
            )
            cache.append_staged(rows, SIZE)
            close(found.view(2, SIZE, -1), expected[:, start : start + SIZE])


def gradients(model, backend="auto", copies=2):
    x_0 = tokens(2, LENGTH)
    x_t = torch.cat([random_masks(x_0, MASK, seed) for seed in range(copies)])
    at = x_t == MASK
    targets = x_0.repeat(copies, 1)[at]
    model.zero_grad()
    nll = model(x_t, x_0, at=at, targets=targets, backend=backend).nll
    (nll * torch.linspace(0.5, 1.5, len(nll))).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def attention_of(model):
    """The attention of the first layer."""
    return [m for m in model.modules() if getattr(m, "layer_idx", None) == 0][-1]


def same_gradients(found, expected):
    assert found.keys() == expected.keys() and len(found) > 5
    for name, own in expected.items():
        torch.testing.assert_close(
            found[name], own, rtol=1e-3, atol=1e-4 * float(own.abs().max()) + 1e-6, msg=name
        )


@EVERY_FAMILY
def test_gradients(family):
    """By blocks of queries as with the whole mask, and with activations computed again."""
    clean, prediction = ("causal", "shift") if FAMILIES.index(family) % 2 else ("block", "same")
    model = adapted(family, clean=clean, prediction=prediction)
    expected = gradients(model, "dense")
    assert all(bool(own.abs().max() > 0) for own in expected.values())
    assert expected.keys() == dict(model.named_parameters()).keys()
    same_gradients(gradients(model, "blockwise"), expected)
    model.train()
    attended = []
    attention_of(model).register_forward_pre_hook(lambda *given: attended.append(1))
    for enable in (model.gradient_checkpointing_enable, partial(recompute_activations, model)):
        enable()
        same_gradients(gradients(model), expected)
        model.gradient_checkpointing_disable()
    assert len(attended) == 4  # in each forward and in each backward


@EVERY_FAMILY
def test_saved_and_opened(family, tmp_path):
    """The same logits to the last bit; its base class opens the folder as what it was."""
    lm = lm_of(family)
    x_0, x_t = pair()
    with torch.no_grad():
        own = lm(input_ids=x_0).logits
        model = adapt(lm, mask_token_id=MASK, block_size=SIZE)
        expected = model(x_t, x_0).logits
        blockdiff.save_model(model, tmp_path)
        again = blockdiff.load_model(tmp_path)
        assert torch.equal(again(x_t, x_0).logits, expected)
        assert again.config.record() == model.config.record()
        base = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(base) is type(lm)
        close(base(input_ids=x_0).logits, own)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == [type(lm).__name__]


@pytest.mark.parametrize("family", list(UNSUITABLE))
def test_what_cannot_be_adapted_is_refused_in_a_line(family):
    model_type, own, drop, reason = UNSUITABLE[family]
    with pytest.raises(Unsuitable, match=f"^{type(tiny(model_type, drop, **own)).__name__} cannot"):
        adapt(tiny(model_type, drop, **own), mask_token_id=MASK, block_size=SIZE)
    with pytest.raises(InputError, match=reason) as refusal:
        adapt(tiny(model_type, drop, **own), mask_token_id=MASK, block_size=SIZE)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "family, rope",
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}),
        (
            "phi3",
            {
                "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4,
                "long_factor": [3.0] * 4, "original_max_position_embeddings": 24,
            },
        ),
    ],
)  # fmt: skip
def test_rotary_positions_that_change_with_the_length_bound_the_context(family, rope):
    """Up to it logits are the model's own; a longer text would turn what is cached already."""
    short = rope.get("original_max_position_embeddings", CONTEXT)
    own = {"original_max_position_embeddings": short} if family == "phi3" else {}
    model_type = family
    lm = tiny(model_type, {"head_dim"}, rope_parameters=dict(rope), **own)
    x_0 = tokens(2, short)
    with torch.no_grad():
        expected = lm(input_ids=x_0).logits
        model = adapt(lm, mask_token_id=MASK, block_size=SIZE)
        assert model.config.length == short
        found = model(x_0, x_0, layout=model.config.layout_of(short, 1)).logits
    close(found[:, 1:], expected[:, :-1])
    with pytest.raises(InputError, match=f"context is {short} tokens"):
        adapt(lm, mask_token_id=MASK, block_size=SIZE, length=short + SIZE)


def test_what_adapt_refuses():
    lm = lm_of("llama")
    for wrong, message in (
        ({"block_size": 0}, "`block_size` is 0"),
        ({"block_size": "a"}, "`block_size` is 'a'"),
        ({"block_size": (4, 4)}, "different numbers"),
        ({"block_size": CONTEXT + 1}, "more than the context of 48"),
        ({"block_size": (7, 8)}, "block size 56 is more than the context of 48"),
        ({"mask_token_id": 17}, "outside the vocabulary"),
        ({"mask_token_id": -1}, "`mask_token_id` is -1"),
        ({"prediction": "next"}, "`prediction` 'next' is unknown"),
        ({"clean": "noised"}, "`clean` 'noised' is unknown"),
        ({"length": 0}, "`length` is 0"),
    ):
        with pytest.raises(InputError, match=message):
            adapt(lm, **{"mask_token_id": MASK, "block_size": SIZE} | wrong)


def test_the_context_is_a_multiple_of_every_block_size():
    config = adapt(lm_of("llama"), mask_token_id=MASK, block_size=(4, 1, 5)).config
    assert (config.block_size, config.block_sizes, config.length) == (5, (1, 4, 5), 40)


def test_without_a_maximum_of_positions():
    lm = lm_of("llama")
    del lm.config.max_position_embeddings
    assert adapt(lm, mask_token_id=MASK, block_size=SIZE).config.length == 2048


@EVERY_FAMILY
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_stored_weights_write_as_plain_ones_do(family, precision):
    """Packed bf16 and int8 are formats of the linear maps; whatever else reads one, reads it."""
    model, plain = adapted(family), adapted(family)
    convert(model, precision, model.device, few_tokens=True)
    plain.to(torch.bfloat16)
    x_0, x_t = pair(2, 8)
    with torch.no_grad():
        own, expected = (one(x_t, x_0=x_0).logits.float() for one in (model, plain))
    spread = expected.std()
    assert (own - expected).abs().mean() < 0.05 * spread, "bf16 and 8 bits are near one another"
    options = blockdiff.SamplingOptions(max_new_tokens=6, stop="none")
    assert len(generate_tokens(model, [[1, 2, 3]], options).tokens[0]) == 6


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_positions_keep_their_precision(precision):
    """Rotary frequencies are buffers: in bf16 a far position would be another."""
    model = adapted("llama")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("inv_freq" in name for name in before)
    convert(model, precision, model.device)
    now = dict(model.named_buffers())
    assert all(torch.equal(now[name], buffer) for name, buffer in before.items())


def test_the_probe_knows_rounding_from_a_wrong_mask():
    """In bf16 by norms: rounding at each step moves them by some hundredths."""
    exact = torch.randn(2, 12, 50, generator=torch.Generator().manual_seed(0))
    rounded = exact + 0.05 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    assert _close(rounded, exact, torch.bfloat16) and not _close(rounded, exact, torch.float32)
    assert not _close(exact.roll(1, dims=1), exact, torch.bfloat16)
