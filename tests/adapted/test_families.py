"""What holds of every family: tiny random models, text longer than their sliding windows."""

import json

import numpy as np
import pytest
import torch
from families import CONTEXT, FAMILIES, MASK, adapted, lm_of, tokens
from transformers import AutoModelForCausalLM

import blockdiff
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.adapting import adapt
from blockdiff.models.loss import subs_nll_from_logits
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
    calls = []
    model.lm.get_decoder().layers if hasattr(model.lm.get_decoder(), "layers") else None
    model.gradient_checkpointing_enable()
    model.train()
    same_gradients(gradients(model), expected)
    model.gradient_checkpointing_disable()
    del calls


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
    assert "blockdiff" not in json.dumps(json.loads((tmp_path / "config.json").read_text())[
        "architectures"
    ])  # fmt: skip
