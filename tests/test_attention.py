import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from blockdiff import attention
from blockdiff.attention import blockwise, choose_backend, dense, flex, make_mask
from blockdiff.attention.masks import dense_mask
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout
from helpers import attend, random_masks, random_tokens, tiny_model

LAYOUTS = [
    BlockLayout(12, 1),
    BlockLayout(12, 3),
    BlockLayout(12, 12),
    BlockLayout(20, 4),  # not a multiple of a chunk of 8
    BlockLayout(24, 4, window=4),
    BlockLayout(24, 4, window=12),
    BlockLayout(24, 3, window=9),
    BlockLayout(24, 1, window=5),
    BlockLayout(24, 2, window=48),
    BlockLayout(24, 4, clean="causal"),
    BlockLayout(24, 24, clean="causal", inside="causal"),
    BlockLayout(24, 4, inside="causal", sliding=7),
    BlockLayout(24, 4, window=12, clean="causal", sliding=5),
    BlockLayout(22, 4, window=12, offset=2),
]
CPU = torch.device("cpu")
KINDS = {"alone": (1, 1), "clean": (1, 1), "noised": (1, 2), "two_stream": (2, 2)}


@pytest.fixture(params=[1, 8, 128], ids=lambda size: f"chunk{size}")
def chunk(request, monkeypatch):
    """Chunks shorter than a block, of a few blocks, and longer than the sequence."""
    monkeypatch.setattr(blockwise, "CHUNK", request.param)
    blockwise._chunks.cache_clear()
    yield request.param
    blockwise._chunks.cache_clear()


def inputs(layout, kind, rows=2):
    queries, keys = KINDS[kind]
    generator = torch.Generator().manual_seed(layout.length + layout.block_size)
    shapes = [(rows, 2, streams * layout.length, 8) for streams in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def some_documents(layout, rows=2):
    """Documents that begin inside blocks, and padding (−1) at the end of the second row."""
    documents = torch.zeros(rows, layout.length, dtype=torch.int64)
    documents[:, layout.length // 3 :] = 1
    documents[:, layout.length // 2 + 1 :] = 2
    documents[-1, -layout.length // 4 :] = -1
    return documents


@pytest.mark.parametrize("with_documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_blockwise_is_dense(layout, kind, with_documents, chunk):
    documents = some_documents(layout) if with_documents else None
    results = {}
    for backend in ("dense", "blockwise"):
        leaves = [x.requires_grad_() for x in inputs(layout, kind)]
        out = attend(*leaves, replace(layout, documents=documents), kind, backend=backend)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results[backend] = [out, *(x.grad for x in leaves)]
    for slow, fast in zip(results["dense"], results["blockwise"], strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("with_documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "layout", [BlockLayout(12, 3), BlockLayout(24, 4, window=12), BlockLayout(144, 16)], ids=str
)
def test_flex_is_dense(layout, kind, with_documents):
    """144 positions are more than one tile of 128."""
    q, k, v = inputs(layout, kind)
    if with_documents:
        layout = replace(layout, documents=some_documents(layout))
    slow = attend(q, k, v, layout, kind, backend="dense")
    fast = attend(q, k, v, layout, kind, backend="flex")
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("clean", BlockLayout(24, 1)),
     ("clean", BlockLayout(24, 24)),
     ("clean", BlockLayout(24, 4, clean="causal", sliding=24)),
     ("clean", BlockLayout(24, 24, clean="causal", window=24)),
     ("alone", BlockLayout(24, 24, clean="causal")),
     ("alone", BlockLayout(24, 24, inside="causal"))],
    ids=str,
)  # fmt: skip
def test_the_kernels_without_a_mask_are_dense(kind, layout):
    """AR, MDLM and a causal clean stream: `sdpa` needs no mask tensor for them."""
    results = []
    for backend in ("dense", "sdpa"):
        leaves = [x.requires_grad_() for x in inputs(layout, kind)]
        out = attend(*leaves, layout, kind, backend=backend)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("clean", BlockLayout(24, 4)),
     ("clean", BlockLayout(24, 24, clean="causal", sliding=5)),
     ("clean", BlockLayout(24, 4, clean="causal", window=8)),
     ("alone", BlockLayout(24, 4, clean="causal")),
     ("clean", BlockLayout(22, 12, offset=2)),
     ("noised", BlockLayout(24, 24, clean="causal")),
     ("two_stream", BlockLayout(24, 1))],
    ids=str,
)  # fmt: skip
def test_other_streams_need_a_mask(kind, layout):
    assert not dense.needs_no_mask(layout, kind)


# What attention is asked in families of language models: heads that share keys, values of another
# width, a scale of its own, capped scores, sinks.
ASKED = {
    "grouped": {"heads": (4, 2)},
    "one head of keys": {"heads": (4, 1), "width": 6},
    "wider values": {"width": 12, "scale": 0.5},
    "capped": {"heads": (4, 2), "softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"heads": (6, 2), "width": 4, "scale": 0.7, "softcap": 1.5, "sinks": True},
}


def asked_of(name, layout, kind, dtype=torch.float32):
    """(q, k, v and perhaps sinks; the rest) of one of `ASKED`."""
    asked = {"heads": (2, 2), "width": 8, "sinks": False} | ASKED[name]
    (heads, shared), width, sinks = (asked.pop(key) for key in ("heads", "width", "sinks"))
    queries, keys = (streams * layout.length for streams in KINDS[kind])
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, heads, queries, 8), (2, shared, keys, 8), (2, shared, keys, width)]
    shapes += [(heads,)] * sinks
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes], asked


def attend_as_asked(leaves, asked, layout, kind, backend):
    q, k, v, *sinks = leaves
    mask = make_mask(layout, kind, backend, CPU, rows=len(q))
    return attention.attend(q, k, v, mask, **asked, sinks=sinks[0] if sinks else None)


def by_loops(leaves, layout, kind, scale=None, softcap=None):
    """Attention one query at a time, in the words of its definition."""
    q, k, v, *sinks = leaves
    rows, heads, queries, width = q.shape
    sees = dense_mask(layout, kind, CPU)
    out = torch.zeros(rows, heads, queries, v.shape[-1])
    for b, h, i in itertools.product(range(rows), range(heads), range(queries)):
        shared = h * k.shape[1] // heads
        scores = [float(q[b, h, i] @ key) * (scale or width**-0.5) for key in k[b, shared]]
        if softcap:
            scores = [softcap * math.tanh(score / softcap) for score in scores]
        parts = [math.exp(s) if seen else 0.0 for s, seen in zip(scores, sees[i], strict=True)]
        total = sum(parts) + (math.exp(sinks[0][h]) if sinks else 0)
        out[b, h, i] = sum(p / total * value for p, value in zip(parts, v[b, shared], strict=True))
    return out


@pytest.mark.parametrize("backend", ["dense", "sdpa", "blockwise", "flex"])
@pytest.mark.parametrize("name", list(ASKED))
def test_what_language_models_ask_of_attention(name, backend):
    kind, layout = "noised", BlockLayout(6, 3)
    if backend == "sdpa":
        kind, layout = "clean", BlockLayout(6, 3, clean="causal")
    leaves, asked = asked_of(name, layout, kind)
    out = attend_as_asked(leaves, asked, layout, kind, backend)
    torch.testing.assert_close(out, by_loops(leaves, layout, kind, **asked), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(ASKED))
def test_gradients_of_all_that_is_asked(name, kind, chunk):
    """Of keys and values that heads share, summed; of sinks, too."""
    layout = BlockLayout(12, 4, clean="causal", sliding=9)
    results = []
    for backend in ("dense", "blockwise"):
        leaves, asked = asked_of(name, layout, kind)
        leaves = [x.requires_grad_() for x in leaves]
        out = attend_as_asked(leaves, asked, layout, kind, backend)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", list(ASKED))
def test_the_backward_by_hand_is_the_slope(name, monkeypatch):
    """Against finite differences, in float64."""
    monkeypatch.setattr(blockwise, "CHUNK", 2)
    blockwise._chunks.cache_clear()
    layout = BlockLayout(4, 2, inside="causal")
    leaves, asked = asked_of(name, layout, "noised", torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: attend_as_asked(leaves, asked, layout, "noised", "blockwise"),
        [x[:1].requires_grad_() if x.dim() > 1 else x.requires_grad_() for x in leaves],
        fast_mode=True,
    )
    blockwise._chunks.cache_clear()


def test_documents_with_all_that_is_asked(chunk):
    layout = BlockLayout(12, 4)
    layout = replace(layout, documents=some_documents(layout))
    leaves, asked = asked_of("all", layout, "two_stream")
    slow, fast, flexible = (
        attend_as_asked(leaves, asked, layout, "two_stream", backend)
        for backend in ("dense", "blockwise", "flex")
    )
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(flexible, slow, rtol=1e-5, atol=2e-6)


def test_heads_that_do_not_fit_each_other():
    layout = BlockLayout(4, 2)
    q, k = torch.zeros(1, 3, 4, 8), torch.zeros(1, 2, 4, 8)
    with pytest.raises(InputError, match="3 heads are no multiple of 2"):
        attend(q, k, k, layout, "clean")


def test_chunks_of_a_causal_clean_stream_are_cut_inside_blocks():
    """One block as long as the text would else be one chunk, with a mask of L × L."""
    layout = BlockLayout(1024, 1024, clean="causal")
    for kind in ("clean", "two_stream"):
        clean = [c for c in blockwise._chunks(layout, kind, CPU) if c.queries.stop <= 1024]
        assert {chunk.length for chunk in clean} == {128}


def test_flex_compiles_for_every_shape_and_never_falls_back(monkeypatch):
    """torch gives up after 8 shapes by default, and runs the kernel unfused."""
    torch._dynamo.reset()
    flex.compiled.cache_clear()
    compilations = CompileCounter()
    run = flex.compiled(compilations)
    for length in range(16, 16 * 13, 16):
        layout = BlockLayout(length, 4)
        q, k, v = inputs(layout, "clean")
        out = run(q, k, v, block_mask=make_mask(layout, "clean", "flex", CPU).form)
        torch.testing.assert_close(out, attend(q, k, v, layout, "clean", backend="dense"))
    assert compilations.frame_count == 12
    flex.compiled.cache_clear()
    torch._dynamo.reset()


def test_prompts_of_any_length_are_a_few_lengths_to_flex():
    """And their keys and values are those of the unpadded text."""
    model = tiny_model(vocab_size=9, length=64, block_size=4)
    seen = set()
    for length in range(4, 600, 44):
        x_0 = random_tokens(model, 2, length)
        documents = torch.zeros_like(x_0)
        documents[:, length // 2 :] = 1
        for layout in (
            BlockLayout(length, 4, window=64), BlockLayout(length, 4, documents=documents)
        ):  # fmt: skip
            seen.add(flex.padded(layout).length)
            with torch.no_grad():
                slow, fast = (model.encode(x_0, layout, backend=b) for b in ("dense", "flex"))
            for a, b in zip(slow.keys + slow.values, fast.keys + fast.values, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert seen == {128, 256, 512, 1024}
    assert flex.padded(BlockLayout(100, 25)).length == 150
    assert flex.padded(BlockLayout(102, 4, offset=2)).length == 130


@pytest.mark.parametrize("backend", ["dense", "blockwise", "flex"])
def test_a_document_mask_is_made_once_a_pass(monkeypatch, backend):
    """Not once for each of the three layers."""
    room = attention._ROOMS[backend]
    made, prepare = [], room.prepare
    monkeypatch.setattr(room, "prepare", lambda *a: made.append(a[1]) or prepare(*a))
    model = tiny_model(vocab_size=9, length=16, block_size=4, num_hidden_layers=3)
    x_0 = random_tokens(model, 2, 16)
    layout = replace(model.config.layout, documents=some_documents(model.config.layout))
    with torch.no_grad():
        model(x_0, x_0=x_0, layout=layout, backend=backend)
        assert made == ["two_stream", "noised"][: 1 if backend == "dense" else 2]
        made.clear()
        model(x_0.repeat(2, 1), x_0=x_0, layout=layout, backend=backend)
    assert made == (["two_stream"] if backend == "dense" else ["clean", "noised"])


def test_draws_share_the_documents_of_their_row():
    """Documents [B, L] under queries [R·B, …], draw-major."""
    layout = BlockLayout(12, 3)
    q, k, v = inputs(layout, "noised", rows=4)
    documents = some_documents(layout)
    for backend in ("dense", "blockwise", "flex"):
        shared, spelt = (replace(layout, documents=x) for x in (documents, documents.repeat(2, 1)))
        shared = attend(q, k, v, shared, "noised", backend=backend)
        own = attend(q, k, v, spelt, "noised", backend=backend)
        assert torch.equal(shared, own)


def reached(layout, kind, backend, query, documents=None):
    """Which keys a query's output depends on, by its gradient in v."""
    q, k, v = inputs(layout, kind, rows=1)
    v.requires_grad_()
    out = attend(q, k, v, replace(layout, documents=documents), kind, backend=backend)
    out[0, :, query].sum().backward()
    return v.grad[0].abs().sum((0, 2)).nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_a_window_limits_the_reach(backend, chunk):
    layout = BlockLayout(24, 4, window=12)
    assert reached(layout, "clean", backend, 17) == list(range(8, 20))
    own = list(range(24 + 16, 24 + 20))
    assert reached(layout, "noised", backend, 17) == list(range(8, 16)) + own
    assert reached(BlockLayout(24, 4), "noised", backend, 17) == list(range(16)) + own
    assert reached(BlockLayout(24, 4, window=4), "noised", backend, 17) == own


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_documents_limit_the_reach(backend, chunk):
    layout = BlockLayout(12, 4)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, -1, -1]])
    assert reached(layout, "clean", backend, 8, documents) == [3, 4, 5, 6, 7, 8]
    assert reached(layout, "noised", backend, 8, documents) == [3, 4, 5, 6, 7, 20]
    assert reached(layout, "clean", backend, 9, documents) == [9]


def forward(model, x_t, x_0, documents, backend):
    layout = BlockLayout(x_0.shape[1], model.config.block_size, documents=documents)
    with torch.no_grad():
        return model(x_t, x_0=x_0, layout=layout, backend=backend).logits


@pytest.mark.parametrize("backend", ["dense", "blockwise", "flex"])
def test_other_documents_and_padding_change_nothing(backend):
    model = tiny_model(vocab_size=9, length=16, block_size=4)
    documents = torch.tensor([[0] * 6 + [1] * 7 + [-1] * 3])
    x_0 = random_tokens(model, 1, 16)
    x_t = random_masks(x_0, 8)
    before = forward(model, x_t, x_0, documents, backend)
    for changed in (slice(0, 6), slice(13, 16)):
        y_0, y_t = x_0.clone(), x_t.clone()
        y_0[:, changed] = (y_0[:, changed] + 3) % 8
        y_t[:, changed] = (y_t[:, changed] + 3) % 9
        after = forward(model, y_t, y_0, documents, backend)
        assert torch.equal(after[:, 6:13], before[:, 6:13])
        assert not torch.equal(after[:, changed], before[:, changed])


def test_flex_refuses_to_train_on_the_cpu():
    model = tiny_model().train()
    x_0 = random_tokens(model, 2, 12)
    with pytest.raises(InputError, match="blockwise"):
        model(x_0, x_0=x_0, backend="flex")
    with torch.no_grad():
        model(x_0, x_0=x_0, backend="flex")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout",
    [
        *LAYOUTS,
        *(
            BlockLayout(24 - offset, size, clean=clean, inside=inside, offset=offset)
            for size in (1, 3, 4, 24) for offset in (0, size // 2)
            for clean in ("block", "causal") for inside in ("bidirectional", "causal")
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_kernels_predicate_is_the_mask(layout, kind):
    """Written with few operations, it sees what the definition says."""
    queries, keys = KINDS[kind]
    query = torch.arange(queries * layout.length)[:, None]
    key = torch.arange(keys * layout.length)[None, :]
    assert torch.equal(flex.predicate(layout, kind)(query, key), dense_mask(layout, kind, CPU))


def test_choice_of_a_backend():
    assert choose_backend("auto", torch.device("cpu")) == "blockwise"
    assert choose_backend("auto", torch.device("mps")) == "blockwise"
    assert choose_backend("auto", torch.device("cuda")) == "flex"
    assert choose_backend("auto", torch.device("cuda"), head_dim=8) == "blockwise"
    assert choose_backend("dense", torch.device("cuda")) == "dense"
    for layout, chosen in (
        (BlockLayout(512, 1), {"cuda": "sdpa", "cpu": "blockwise", "mps": "blockwise"}),
        (BlockLayout(512, 512), {"cuda": "sdpa", "cpu": "sdpa", "mps": "blockwise"}),
        (BlockLayout(512, 4), {"cuda": "flex", "cpu": "blockwise", "mps": "blockwise"}),
        (BlockLayout(512, 1, window=8), {"cuda": "flex", "cpu": "blockwise", "mps": "blockwise"}),
    ):
        for device, name in chosen.items():
            found = choose_backend("auto", torch.device(device), layout=layout, kind="clean")
            assert found == name
            with_documents = replace(layout, documents=some_documents(layout))
            found = choose_backend("auto", torch.device(device), 64, with_documents, "clean")
            assert found != "sdpa"
    cuda, layout = torch.device("cuda"), BlockLayout(1024, 4)
    assert choose_backend("auto", cuda, 8, layout, "clean", 16) == "dense"
    assert choose_backend("auto", cuda, 8, layout, "clean", 17) == "blockwise"
    assert choose_backend("auto", cuda, 64, layout, "clean", 16) == "flex"
    with torch.no_grad():
        assert choose_backend("auto", cuda, 64, layout, "clean", 16) == "dense"
        assert choose_backend("auto", cuda, 64, layout, "clean", 17) == "flex"
        assert choose_backend("auto", cuda, 64, layout, "noised", 9) == "flex"
    with pytest.raises(InputError, match="flex"):
        choose_backend("flash", torch.device("cpu"))
    q, k, v = inputs(LAYOUTS[0], "clean")
    with pytest.raises(InputError):
        attend(q, k, v, LAYOUTS[0], "clean", backend="flash")


@pytest.mark.parametrize("peak", [1, 4, 12], ids=lambda peak: f"peak{peak}")
@pytest.mark.parametrize("kind", list(KINDS))
def test_bf16_errs_no_more_than_dense(kind, peak, chunk):
    """Forward and gradients against float64, attention flat and peaked: at most 1.3 of dense's.

    Scores rounded to bf16 would make it 1.7 to 9 times dense's.
    """
    layout = BlockLayout(128, 4)
    queries, keys = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    q, k, v, outer = (
        torch.randn(2, 2, streams * 128, 32, generator=generator).bfloat16()
        for streams in (queries, keys, keys, queries)
    )
    q = q * peak

    def results(backend, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, layout, kind, backend=backend)
        return [x.double() for x in (out, *torch.autograd.grad(out, leaves, outer.to(dtype)))]

    exact = results("dense", torch.float64)
    errors = {
        backend: [
            ((x - y).norm() / y.norm()).item()
            for x, y in zip(results(backend, torch.bfloat16), exact, strict=True)
        ]
        for backend in ("dense", "blockwise")
    }
    for slow, fast in zip(errors["dense"], errors["blockwise"], strict=True):
        assert 0 < fast < 1.3 * slow
    torch.testing.assert_close(results("blockwise", torch.float64), exact, rtol=1e-9, atol=1e-9)
