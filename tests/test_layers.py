"""Parts of the network against the plain operators they replace."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from blockdiff.models.layers import _Heads, _plain_heads, drop, rope
from blockdiff.training.parallel import recompute_activations
from helpers import random_masks, random_tokens, tiny_model


@pytest.mark.parametrize("own_positions", [False, True], ids=["shared", "of each row"])
def test_rotated_heads_and_their_gradient(own_positions):
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(50, (3, 7), generator=generator) if own_positions else torch.arange(7)
    cos, sin = rope(positions, 8)
    if own_positions:
        cos, sin = cos[:, None], sin[:, None]
    results = []
    for law in (_plain_heads, _Heads.apply):
        qkv = torch.randn(3, 7, 3 * 16, generator=torch.Generator().manual_seed(1))
        qkv.requires_grad_()
        out = law(qkv, cos, sin, 2)
        sum((x * (i + 1) * x.detach().sin()).sum() for i, x in enumerate(out)).backward()
        results.append([*out, qkv.grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
    x = torch.full((3, 333, 101), 2.0, requires_grad=True)
    torch.manual_seed(0)
    out = drop(x, rate)
    dropped = (out == 0).double().mean().item()
    # 4 standard errors of a share of 100,899: wrong once in 16,000.
    assert abs(dropped - rate) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert out[out > 0].unique().item() == pytest.approx(2 / (1 - rate), rel=1e-4)
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0)
    torch.manual_seed(0)
    assert torch.equal(drop(x, rate), out), "the seed decides"


def test_neighbours_are_dropped_independently():
    """Four elements share one random number of 64 bits."""
    torch.manual_seed(1)
    kept = drop(torch.ones(40_000, 4), 0.5) > 0
    patterns = (kept * torch.tensor([1, 2, 4, 8])).sum(-1).bincount(minlength=16)
    chi_square = ((patterns - 2500) ** 2 / 2500).sum().item()
    assert chi_square < 44.3  # 15 degrees of freedom, rejects wrongly once in 10,000


def test_no_dropout_is_nothing():
    x = torch.randn(5)
    assert torch.equal(drop(x, 0.0), x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("settings", [{}, {"time_conditioning": True}, {"causal": True}], ids=str)
def test_a_layer_compiles_without_a_break(training, settings):
    """Both halves are one graph each, dropout and the folding of adaLN included."""
    layer = tiny_model(**settings).train(training).layers[0]
    layer.dropout = 0.5
    h = torch.randn(2, 7, 16, requires_grad=training)
    cos, sin = rope(torch.arange(7), 8)
    rows = 2 if settings.get("time_conditioning") else 1
    condition = None if "causal" in settings else torch.randn(rows, 1, 8)

    def project(h):
        return layer.project(h, cos, sin, layer.fold(condition))

    def update(h):
        return layer.update(h, h, layer.fold(condition))

    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        for half in (project, update):
            found = torch._dynamo.explain(half)(h)
            assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
            if half is project or not training:
                compiled = torch.compile(half, fullgraph=True, backend="eager")
                torch.testing.assert_close(compiled(h), half(h))
    torch._dynamo.reset()


@pytest.mark.parametrize("layers", [2, 5])
def test_a_compiled_network_is_few_graphs(layers):
    """Before attention, and after it; the last layer's chosen positions: their first number, any.

    Attention runs its own kernels. Layers share their graphs.
    """
    torch._dynamo.reset()
    model = tiny_model(vocab_size=9, length=16, num_hidden_layers=layers).train()
    graphs = CompileCounter()
    model.compile_layers(backend=graphs)
    x_0 = random_tokens(model, 2, 16)
    at = torch.ones_like(x_0, dtype=torch.bool)
    for step in range(5):
        at[0, step] = False
        model(x_0, x_0=x_0, at=at, targets=x_0[at]).nll.sum().backward()
    assert graphs.frame_count == 4
    torch._dynamo.reset()


class Saved:
    """Bytes that autograd keeps for the backward of what runs inside."""

    def __enter__(self):
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def pack(self, x):
        self.bytes += x.nbytes
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("copies", [1, 2], ids=["two streams", "encoded"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_give_the_same_gradients_and_are_not_kept(copies, dropout):
    x_0, found = None, []
    for again in (False, True):
        model = tiny_model(vocab_size=9, length=64, block_size=4, num_hidden_layers=4).train()
        for layer in model.layers:
            layer.dropout = dropout
        if again:
            recompute_activations(model)
        x_0 = random_tokens(model, 4, 64)
        x_t = random_masks(x_0.repeat(copies, 1), 8)
        at = x_t == 8
        torch.manual_seed(1)
        with Saved() as saved:
            nll = model(x_t, x_0=x_0, at=at, targets=x_0.repeat(copies, 1)[at]).nll
        nll.sum().backward()
        found.append((saved.bytes, nll, [p.grad for p in model.parameters()]))
    (kept, *plain), (less, *recomputed) = found
    assert less < 0.4 * kept
    torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)


def test_transformers_own_switch_recomputes_as_well():
    """Its name differs between versions; what it sets on a layer is what a layer reads."""
    model = tiny_model(vocab_size=9, length=16)
    assert model.supports_gradient_checkpointing
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
    assert all(layer.gradient_checkpointing for layer in model.layers)
    x_0 = random_tokens(model, 2, 16)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *unused: calls.append(1))
    project = model.layers[0].project
    model.layers[0].project = lambda *a: calls.append(2) or project(*a)
    model.train()(x_0, x_0=x_0).logits.sum().backward()
    assert calls == [1, 2, 2], "hooks stay outside"
