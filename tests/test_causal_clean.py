"""A clean stream that sees itself causally: one cache for every block size, exact AR at L' = 1."""

import itertools
import json

import numpy as np
import pytest
import torch

import blockdiff
from blockdiff.errors import InputError
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.config import DiTConfig
from blockdiff.models.loss import subs_nll_from_logits
from blockdiff.training.config import TrainConfig
from helpers import random_masks, random_tokens, tiny_model

BACKENDS = pytest.mark.parametrize("backend", ["dense", "blockwise", "flex"])
CLEAN = pytest.mark.parametrize("clean", ["block", "causal"])
MASK = 8


def made(clean="causal", **settings):
    return tiny_model(
        vocab_size=9, clean_stream=clean, **{"length": 12, "block_size": 4} | settings
    )


def pair(model, rows=2, length=12):
    x_0 = random_tokens(model, rows, length)
    return x_0, random_masks(x_0, MASK)


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# the configuration


def test_the_folder_tells(tmp_path):
    model = made()
    blockdiff.save_model(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["clean_stream"] == "causal"
    opened = blockdiff.load_model(tmp_path)
    assert opened.config.layout.clean == "causal"
    x_0, x_t = pair(model)
    close(logits(opened, x_t, x_0=x_0), logits(model, x_t, x_0=x_0))
    del written["clean_stream"]  # a folder of before
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert blockdiff.load_model(tmp_path).config.clean_stream == "block"
    written["clean_stream"] = "token"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"`clean_stream` 'token' is unknown"):
        blockdiff.load_model(tmp_path)


def test_an_ar_model_is_causal_whatever_it_is_told():
    assert DiTConfig(9, 12, causal=True, clean_stream="block").clean_stream == "causal"


def test_what_training_is_told():
    assert TrainConfig(clean="causal").clean == "causal"
    for wrong, message in (
        ({"clean": "token"}, "`clean` 'token' is unknown; choose one of block, causal"),
        ({"clean": "causal", "objective": "mdlm"}, "an mdlm model does not have"),
        ({"clean": "causal", "objective": "ar"}, "an ar model does not have"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig(**wrong)


# who sees what


@BACKENDS
def test_later_tokens_change_nothing(backend):
    """Of x_0: neither earlier keys and values, nor the noised blocks up to their own."""
    model = made()
    x_0, x_t = pair(model)
    before = logits(model, x_t, x_0=x_0, backend=backend)
    with torch.no_grad():
        keys = model.encode(x_0, backend=backend).keys[-1]
    for position in (1, 6, 11):
        y_0 = x_0.clone()
        y_0[:, position] = (x_0[:, position] + 1) % 8
        after = logits(model, x_t, x_0=y_0, backend=backend)
        differs = (after - before).abs().amax((0, 2)) > 1e-6
        assert differs.nonzero().flatten().tolist() == list(range(position // 4 * 4 + 4, 12))
        with torch.no_grad():
            moved = (model.encode(y_0, backend=backend).keys[-1] - keys).abs().amax((0, 1, 3))
        assert (moved > 1e-6).nonzero().flatten().tolist() == list(range(position, 12))


@BACKENDS
def test_keys_and_values_are_those_of_every_block_size(backend):
    model, other = made(), made("block")
    x_0 = random_tokens(model, 2, 12)

    def stored(network, size):
        with torch.no_grad():
            context = network.encode(x_0, network.config.layout_of(12, size), backend=backend)
        return torch.stack(context.keys + context.values)

    for size in (1, 2, 3, 4, 6, 12):
        close(stored(model, size), stored(model, 1))
    assert (stored(other, 4) - stored(other, 1)).abs().max() > 0.01
    close(stored(other, 1), stored(model, 4))  # the same weights


@BACKENDS
def test_a_noised_text_alone_is_one_block(backend):
    """MDLM, and a model asked without x_0: everything sees everything."""
    for settings in ({"block_size": 12}, {}):
        x_t = pair(made())[1]
        close(*(logits(made(c, **settings), x_t, backend=backend) for c in ("causal", "block")))
        y_t = x_t.clone()
        y_t[:, 7] = (x_t[:, 7] + 1) % 9
        moved = logits(made(**settings), y_t, backend=backend)
        assert ((moved - logits(made(**settings), x_t, backend=backend)).abs() > 1e-6).any(2).all()


@pytest.mark.parametrize("block_size", [1, 4, 12])
@pytest.mark.parametrize("copies", [1, 2])
def test_backends_agree_in_gradients(block_size, copies):
    model = made(block_size=block_size)
    x_0 = random_tokens(model, 2, 12)
    x_t = torch.cat([random_masks(x_0, MASK, seed=seed) for seed in range(copies)])
    found = []
    for backend in ("dense", "blockwise"):
        out = model(x_t, x_0=x_0, backend=backend).logits
        loss = (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        found.append([out, *torch.autograd.grad(loss, list(model.parameters()))])
    for slow, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    close(logits(model, x_t, x_0=x_0, backend="flex"), found[0][0].detach())


# the cache


@CLEAN
@pytest.mark.parametrize("inside", ["bidirectional", "causal"])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_decoding_with_the_cache_is_the_forward_pass(clean, inside, offset):
    """Past the window of 12 tokens too, and where the first block is short by `offset`.

    A finished block is run beside the noised one behind it, as the sampler does.
    """
    model, size, length = made(clean), 4, 28 - offset
    model.config.inside_block = inside
    x_0, x_t = pair(model, length=length)
    layout = model.config.layout_of(length, window=12, offset=offset)
    expected = logits(model, x_t, x_0=x_0, layout=layout, backend="dense")
    conventions = {"clean_stream": clean, "inside_block": inside}
    rows = np.arange(2)
    cache = model.new_cache(2, 8, size)
    cache.admit(rows, np.full(2, size), np.full(2, 8))
    with torch.no_grad():
        first = size - offset
        context = model.encode(x_0[:, :first], model.config.layout_of(first, offset=offset))
        cache.append(rows, context.keys, context.values, np.full(2, first))
        for start in range(first, length, size):
            clean_columns = 0 if start == first else size
            span = torch.arange(start - clean_columns, start + size)
            x = torch.cat([x_0[:, span[:clean_columns]], x_t[:, span[clean_columns:]]], 1)
            wanted = torch.arange(2)[:, None] * len(span) + clean_columns + torch.arange(size)
            has = np.full(2, clean_columns > 0)
            mask = cache.visible(clean_columns, size, has, **conventions)
            found = model.decode(
                x, span.expand(2, -1), cache, wanted.flatten(), mask=mask, clean=clean_columns
            )
            if clean_columns:
                cache.append_staged(rows, size)
            close(found.view(2, size, -1), expected[:, start : start + size])


# the likelihood


def test_blocks_of_one_are_the_exact_autoregressive_likelihood():
    """From the weights of any block size: all continuations together have probability 1."""
    model = tiny_model(vocab_size=4, length=5, block_size=5, clean_stream="causal", seed=3)
    tails = torch.tensor(list(itertools.product(range(3), repeat=4)))
    x_0 = torch.cat([torch.full((len(tails), 1), 2), tails], dim=1)
    with pytest.warns(UserWarning, match="trained with block size 5, not 1"):
        found = likelihood(model, x_0, "enumerate", block_size=1)
    assert found.exact and found.nats.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    # The chain rule, one mask at a time behind the clean tokens before it.
    total = torch.zeros(len(x_0))
    for i in range(1, 5):
        y_0 = x_0[:, : i + 1]
        y_t = torch.cat([x_0[:, :i], torch.full((len(x_0), 1), 3)], dim=1)
        layout = model.config.layout_of(i + 1, 1)
        out = logits(model, y_t, x_0=y_0, layout=layout, backend="dense")[:, -1]
        total += subs_nll_from_logits(out, x_0[:, i], 3)
    close(found.nats.float(), total)


@pytest.mark.filterwarnings("ignore:the model was trained with block size")
def test_rows_of_every_block_size_share_one_prompt():
    """Greedy texts: a row's is the same alone and beside rows of other block sizes."""
    model = made(length=24)
    prompt = random_tokens(model, 1, 13)[0].tolist()
    engine, names, options = blockdiff.Engine(model), {}, {}
    for size in (1, 2, 4, 8):
        options[size] = blockdiff.SamplingOptions(max_new_tokens=16, block_size=size, stop="none")
        names[engine.admit(prompt, options[size], 0)] = size
    while engine.active:
        step = engine.step()
    for place, name in enumerate(step.rows.tolist()):
        alone = blockdiff.Engine(model)
        alone.admit(prompt, options[names[name]], 0)
        while alone.active:
            last = alone.step()
        assert last.tokens[0].tolist() == step.tokens[place, : len(last.tokens[0])].tolist()
