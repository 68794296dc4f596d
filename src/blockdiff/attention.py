"""Attention under the block layout: three backends behind one call.

    dense      SDPA with the whole mask as a tensor: the slow, obvious reference
    blockwise  chunks of queries, each with only the keys it may see, as matrix products: every
               device, forward and backward, no work on the tiles that are masked out whole
    flex       FlexAttention with a BlockMask: CUDA; on a CPU its forward only

Shapes: B batch, R draws, H heads, D head width, L positions, Q queries, S keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blockdiff.device import cached
from blockdiff.errors import InputError
from blockdiff.layout import BlockLayout, dense_mask, mask_rows

BACKENDS = ("auto", "dense", "blockwise", "flex")

# Queries per chunk of `blockwise`, or an eighth of the sequence if that is more: long enough for
# efficient matrix products, short enough that the half-masked tile on the diagonal stays a small
# part of the work.
CHUNK = 64
LONGEST_CHUNK = 256


def choose_backend(backend: str, device: torch.device) -> str:
    """Resolves "auto": `flex` on CUDA, `blockwise` on the CPU and on MPS."""
    if backend not in BACKENDS:
        raise InputError(f"no attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    return "flex" if device.type == "cuda" else "blockwise"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kind: str,
    *,
    backend: str = "blockwise",
) -> Tensor:
    """Softmax attention under one part of the two-stream mask.

    `kind` "clean": q, k, v [B, H, L, D], the x_0 stream alone (M_BC). "noised": q [R·B, H, L, D]
    from x_t, k and v [R·B, H, 2L, D] over x_0 ⊕ x_t (M_OBC and M_BD). "two_stream": all 2L tokens
    x_0 ⊕ x_t at once. The layout's documents are [B, L] or [R·B, L]. Returns the
    shape of q.
    """
    documents, layout = layout.documents, layout.plain
    if documents is not None:
        if documents.shape[0] != q.shape[0]:
            documents = documents.repeat(q.shape[0] // documents.shape[0], 1)
        streams = {"clean": (1, 1), "noised": (1, 2), "two_stream": (2, 2)}[kind]
        same = documents.repeat(1, streams[0]), documents.repeat(1, streams[1])
    else:
        same = None
    if backend == "dense":
        mask = dense_mask(layout, kind, q.device)
        if same is not None:
            mask = (mask & _same(same[0], same[1]))[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if backend == "blockwise":
        return _blockwise(q, k, v, layout, kind, same)
    if backend == "flex":
        return _flex(q, k, v, layout, kind, same)
    raise InputError(f"no attention backend {backend!r}; choose one of {', '.join(BACKENDS)}")


def _same(query_documents: Tensor, key_documents: Tensor) -> Tensor:
    """[B, Q, S] bool."""
    return query_documents[:, :, None] == key_documents[:, None, :]


Span = tuple[int, int]


class Chunk(NamedTuple):
    """Some queries, the spans of keys any of them may see, and what is hidden from some of them.

    `hidden` bool [q, h] or [B, 1, q, h] covers the last h of those keys, True = may not attend;
    every query sees all the keys before.
    """

    queries: slice
    spans: tuple[Span, ...]
    hidden: Tensor | None


def _blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kind: str,
    documents: tuple[Tensor, Tensor] | None,
) -> Tensor:
    chunks = _chunks(layout, kind, q.device)
    if documents is not None:
        chunks = [_within_documents(chunk, *documents) for chunk in chunks]
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _ChunkedAttention.apply(q, k, v, chunks)
    return out


def _within_documents(chunk: Chunk, of_query: Tensor, of_key: Tensor) -> Chunk:
    """The chunk with the keys of other documents hidden as well."""
    hidden = ~_same(of_query[:, chunk.queries], _gather(of_key, chunk.spans, 1))
    if chunk.hidden is not None:
        hidden[..., hidden.shape[-1] - chunk.hidden.shape[-1] :] |= chunk.hidden
    return chunk._replace(hidden=hidden[:, None])


class _ChunkedAttention(torch.autograd.Function):
    """softmax(q kᵀ/√D) v, a chunk of queries at a time, forward and backward.

    The backward computes each chunk's softmax again, so that no [Q, S] tensor outlives its chunk,
    and adds into gradients allocated once.

    Scores, softmax, its slope and the sums over chunks are float32 whatever q, k and v are: a score
    of 20 rounded to bf16 is off by up to 0.06, and its probability by 6%. The other products, with
    v and of the gradients, are in q's precision, as in SDPA's kernels; so is the error
    (docs/performance.md has both, and the cost).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, chunks: list[Chunk]) -> Tensor:
        # Heads last in memory: the layout the next linear map reads.
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        out = out.transpose(1, 2)
        for chunk in chunks:
            probability = _probabilities(q, k, chunk).to(q.dtype)
            out[:, :, chunk.queries] = probability @ _gather(v, chunk.spans, -2)
        ctx.save_for_backward(q, k, v)
        ctx.chunks = chunks
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        (outer,) = gradients
        of_q = torch.empty_like(q)
        of_k, of_v = (torch.zeros_like(x, dtype=_wide(x)) for x in (k, v))
        scale = q.shape[-1] ** -0.5
        for chunk in ctx.chunks:
            own = outer[:, :, chunk.queries]
            probability = _probabilities(q, k, chunk)
            _scatter(of_v, chunk.spans, probability.to(q.dtype).mT @ own)
            # ∂ softmax: p · (g − Σ p g), one fused pass
            slope = (own @ _gather(v, chunk.spans, -2).mT).to(probability.dtype)
            slope = torch.ops.aten._softmax_backward_data(slope, probability, -1, slope.dtype)
            slope = slope.mul_(scale).to(q.dtype)
            of_q[:, :, chunk.queries] = slope @ _gather(k, chunk.spans, -2)
            _scatter(of_k, chunk.spans, slope.mT @ q[:, :, chunk.queries])
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None


def _wide(x: Tensor) -> torch.dtype:
    """float32, or what x has if that is more."""
    return torch.promote_types(x.dtype, torch.float32)


def _probabilities(q: Tensor, k: Tensor, chunk: Chunk) -> Tensor:
    """Attention weights [B, H, q, S], at least float32, of a chunk over its own keys."""
    query = q[:, :, chunk.queries].to(_wide(q)) * q.shape[-1] ** -0.5
    scores = query @ _gather(k, chunk.spans, -2).to(_wide(k)).mT
    if chunk.hidden is not None:
        tail = scores[..., scores.shape[-1] - chunk.hidden.shape[-1] :]
        tail.masked_fill_(chunk.hidden, -torch.inf)
    return scores.softmax(-1)


def _gather(x: Tensor, spans: tuple[Span, ...], dim: int) -> Tensor:
    """The spans of x along `dim`, side by side; a view when there is only one."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _scatter(x: Tensor, spans: tuple[Span, ...], parts: Tensor) -> None:
    """Adds to x [B, H, S, D] what `_gather` of the spans would have read."""
    begin = 0
    for start, stop in spans:
        x[:, :, start:stop] += parts[:, :, begin : begin + stop - start]
        begin += stop - start


@cached(64)
def _chunks(layout: BlockLayout, kind: str, device: torch.device) -> list[Chunk]:
    """The chunks of one kind of attention, read off the layout's one predicate."""
    size = max(CHUNK, min(layout.length // 8, LONGEST_CHUNK))
    size = max(size // layout.block_size, 1) * layout.block_size
    chunks = []
    streams = 2 if kind == "two_stream" else 1
    for base in range(0, streams * layout.length, layout.length):
        for start in range(base, base + layout.length, size):
            queries = slice(start, min(start + size, base + layout.length))
            sees = mask_rows(layout, kind, queries, device)
            spans = _runs(sees.any(0))
            hidden = ~_gather(sees, spans, 1)
            # The keys in front that every query sees need no mask.
            first = int(hidden.any(0).int().argmax()) if bool(hidden.any()) else hidden.shape[1]
            hidden = hidden[:, first:].contiguous()
            chunks.append(Chunk(queries, spans, hidden if hidden.numel() else None))
    return chunks


def _runs(flags: Tensor) -> tuple[Span, ...]:
    """(start, end) of each run of True in flags [n]."""
    edges = torch.diff(flags.int(), prepend=flags.new_zeros(1), append=flags.new_zeros(1))
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    return tuple(zip(starts.flatten().tolist(), stops.flatten().tolist(), strict=True))


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kind: str,
    documents: tuple[Tensor, Tensor] | None,
) -> Tensor:
    on_cuda = q.device.type == "cuda"
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if trained and not on_cuda:
        raise InputError(
            f"flex attention has no backward on {q.device.type}; train with the blockwise backend"
        )
    if documents is None:
        mask = _block_mask(layout, kind, q.device)
    else:
        mask = _document_block_mask(layout, kind, q.device, documents)
    run = _compiled_flex() if on_cuda else flex_attention
    return run(q, k, v, block_mask=mask)


@lru_cache(maxsize=1)
def _compiled_flex():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=False)


def _predicate(layout: BlockLayout, kind: str):  # type: ignore[no-untyped-def]
    return {
        "clean": layout.m_bc,
        "noised": layout.noised_sees,
        "two_stream": layout.two_stream_sees,
    }[kind]


def _sizes(layout: BlockLayout, kind: str) -> tuple[int, int]:
    queries, keys = {"clean": (1, 1), "noised": (1, 2), "two_stream": (2, 2)}[kind]
    return queries * layout.length, keys * layout.length


@cached(64)
def _block_mask(layout: BlockLayout, kind: str, device: torch.device) -> BlockMask:
    sees = _predicate(layout, kind)
    queries, keys = _sizes(layout, kind)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key)

    return create_block_mask(mask_mod, None, None, queries, keys, device=device)


def _document_block_mask(
    layout: BlockLayout, kind: str, device: torch.device, documents: tuple[Tensor, Tensor]
) -> BlockMask:
    sees = _predicate(layout, kind)
    queries, keys = _sizes(layout, kind)
    of_query, of_key = documents

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees(query, key) & (of_query[b, query] == of_key[b, key])

    return create_block_mask(mask_mod, of_query.shape[0], None, queries, keys, device=device)
