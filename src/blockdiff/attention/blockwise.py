"""Attention by chunks of queries, each with only the keys that some of them may see.

The backward is by hand: gradients are allocated once and added to, where autograd would pad the
gradient of every slice. Shapes: B batch, H heads, D head width, Q queries, S keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockdiff.attention.masks import KINDS, Documents, mask_rows, same_document
from blockdiff.device import cached
from blockdiff.layout import BlockLayout

# Queries per chunk, or an eighth of the sequence if that is more: long enough for efficient matrix
# products, short enough that the half-masked tile on the diagonal stays a small part of the work.
CHUNK = 64
LONGEST_CHUNK = 256

Span = tuple[int, int]


class Chunk(NamedTuple):
    """Some queries, the spans of keys any of them may see, and what is hidden from some of them.

    `hidden` bool [q, h] or [B, 1, q, h] covers the last h of those keys, True = may not attend;
    every query sees all the keys before.
    """

    queries: slice
    spans: tuple[Span, ...]
    hidden: Tensor | None


def prepare(
    layout: BlockLayout, kind: str, device: torch.device, documents: Documents | None
) -> list[Chunk]:
    chunks = _chunks(layout, kind, device)
    if documents is None:
        return chunks
    return [_within_documents(chunk, *documents) for chunk in chunks]


def attend(q: Tensor, k: Tensor, v: Tensor, chunks: list[Chunk]) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _ChunkedAttention.apply(q, k, v, chunks)
    return out


def _within_documents(chunk: Chunk, of_query: Tensor, of_key: Tensor) -> Chunk:
    """The chunk with the keys of other documents hidden as well."""
    hidden = ~same_document(of_query[:, chunk.queries], _gather(of_key, chunk.spans, 1))
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


@cached
def _chunks(layout: BlockLayout, kind: str, device: torch.device) -> list[Chunk]:
    """The chunks of one kind of attention, read off the layout's one predicate."""
    size = max(CHUNK, min(layout.length // 8, LONGEST_CHUNK))
    size = max(size // layout.block_size, 1) * layout.block_size
    chunks = []
    streams = KINDS[kind].queries
    for base in range(0, streams * layout.length, layout.length):
        for start in range(base, base + layout.length, size):
            queries = slice(start, min(start + size, base + layout.length))
            sees = mask_rows(layout, kind, queries, device)
            spans = _runs(sees.any(0))
            hidden = ~_gather(sees, spans, 1)
            # The first keys, up to one that is hidden from some query, need no mask.
            first = int(hidden.any(0).int().argmax()) if bool(hidden.any()) else hidden.shape[1]
            hidden = hidden[:, first:].contiguous()
            chunks.append(Chunk(queries, spans, hidden if hidden.numel() else None))
    return chunks


def _runs(flags: Tensor) -> tuple[Span, ...]:
    """(start, end) of each run of True in flags [n]."""
    edges = torch.diff(flags.int(), prepend=flags.new_zeros(1), append=flags.new_zeros(1))
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    return tuple(zip(starts.flatten().tolist(), stops.flatten().tolist(), strict=True))
