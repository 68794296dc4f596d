"""Attention by chunks of queries, each with only the keys that some of them may see.

The backward is by hand: gradients are allocated once and added to, where autograd would pad the
gradient of every slice. Heads that share keys and values are put side by side as queries, so that
neither is repeated and their gradients come out summed. Shapes: B batch, H heads, H_kv heads of
keys and values, D head width, Q queries, S keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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

    @property
    def length(self) -> int:
        return int(self.queries.stop - self.queries.start)


def prepare(
    layout: BlockLayout, kind: str, device: torch.device, documents: Documents | None
) -> list[Chunk]:
    chunks = _chunks(layout, kind, device)
    if documents is None:
        return chunks
    return [_within_documents(chunk, *documents) for chunk in chunks]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: list[Chunk],
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _ChunkedAttention.apply(q, k, v, sinks, chunks, scale, softcap)
    return out


def _within_documents(chunk: Chunk, of_query: Tensor, of_key: Tensor) -> Chunk:
    """The chunk with the keys of other documents hidden as well."""
    hidden = ~same_document(of_query[:, chunk.queries], _gather(of_key, chunk.spans, 1))
    if chunk.hidden is not None:
        hidden[..., hidden.shape[-1] - chunk.hidden.shape[-1] :] |= chunk.hidden
    return chunk._replace(hidden=hidden[:, None])


class _ChunkedAttention(torch.autograd.Function):
    """softmax(q kᵀ · scale) v, a chunk of queries at a time, forward and backward.

    The backward computes each chunk's softmax again, so that no [Q, S] tensor outlives its chunk,
    and adds into gradients allocated once.

    Scores, softmax, its slope and the sums over chunks are float32 whatever q, k and v are: a score
    of 20 rounded to bf16 is off by up to 0.06, and its probability by 6%. The other products, with
    v and of the gradients, are in q's precision, as in SDPA's kernels; so is the error
    (docs/performance.md has both, and the cost).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        chunks: list[Chunk],
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        # Heads last in memory: the layout the next linear map reads.
        rows, heads, queries, _ = q.shape
        out = q.new_empty(rows, queries, heads, v.shape[-1]).transpose(1, 2)
        ctx.chunks, ctx.scale, ctx.softcap, ctx.group = chunks, scale, softcap, heads // k.shape[1]
        for chunk in chunks:
            probability, _ = _probabilities(ctx, q, k, sinks, chunk)
            own = _keys_only(probability, sinks).to(q.dtype) @ _gather(v, chunk.spans, -2)
            out[:, :, chunk.queries] = _unfold(own, ctx.group)
        ctx.save_for_backward(q, k, v, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        (outer,) = gradients
        of_q = torch.empty_like(q)
        of_k, of_v = (torch.zeros_like(x, dtype=_wide(x)) for x in (k, v))
        of_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=_wide(sinks))
        for chunk in ctx.chunks:
            own = _fold(outer[:, :, chunk.queries], ctx.group)
            probability, bend = _probabilities(ctx, q, k, sinks, chunk)
            _scatter(of_v, chunk.spans, _keys_only(probability, sinks).to(q.dtype).mT @ own)
            # ∂ softmax: p · (g − Σ p g), one fused pass
            slope = (own @ _gather(v, chunk.spans, -2).mT).to(probability.dtype)
            if of_sinks is not None:
                slope = F.pad(slope, (0, 1))  # a sink has no value
            slope = torch.ops.aten._softmax_backward_data(slope, probability, -1, slope.dtype)
            if of_sinks is not None:
                of_sinks += _unfold(slope[..., -1:], ctx.group).sum((0, 2, 3))
                slope = _keys_only(slope, sinks)
            if bend is not None:
                slope = slope.mul_(bend)
            slope = slope.mul_(ctx.scale).to(q.dtype)
            of_q[:, :, chunk.queries] = _unfold(slope @ _gather(k, chunk.spans, -2), ctx.group)
            _scatter(of_k, chunk.spans, slope.mT @ _fold(q[:, :, chunk.queries], ctx.group))
        if of_sinks is not None:
            of_sinks = of_sinks.to(sinks.dtype)
        return of_q, of_k.to(k.dtype), of_v.to(v.dtype), of_sinks, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    """float32, or what x has if that is more."""
    return torch.promote_types(x.dtype, torch.float32)


def _fold(x: Tensor, group: int) -> Tensor:
    """[B, H, q, D] → [B, H_kv, group · q, D]: heads that share keys, side by side as queries."""
    return x if group == 1 else x.unflatten(1, (-1, group)).flatten(2, 3)


def _unfold(x: Tensor, group: int) -> Tensor:
    """The way back from `_fold`."""
    return x if group == 1 else x.unflatten(2, (group, -1)).flatten(1, 2)


def _keys_only(x: Tensor, sinks: Tensor | None) -> Tensor:
    """Without the column of the sinks, which stands last."""
    return x if sinks is None else x[..., :-1]


def _probabilities(
    ctx: Any, q: Tensor, k: Tensor, sinks: Tensor | None, chunk: Chunk
) -> tuple[Tensor, Tensor | None]:
    """Attention weights [B, H_kv, group · q, S (+ 1)] of a chunk over its own keys, and the bend.

    At least float32. With sinks their share stands behind the keys. The bend is the derivative of
    the soft cap at each score, None without one.
    """
    query = _fold(q[:, :, chunk.queries].to(_wide(q)) * ctx.scale, ctx.group)
    scores, bend = query @ _gather(k, chunk.spans, -2).to(_wide(k)).mT, None
    if ctx.softcap is not None:
        scores = scores.div_(ctx.softcap).tanh_()
        bend = 1 - scores * scores
        scores = scores.mul_(ctx.softcap)
    if chunk.hidden is not None:
        tail = scores[..., scores.shape[-1] - chunk.hidden.shape[-1] :]
        tail.unflatten(2, (ctx.group, -1)).masked_fill_(chunk.hidden.unsqueeze(-3), -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(len(q), -1, chunk.length, 1)
        scores = torch.cat([scores, _fold(column, ctx.group)], dim=-1)
    return scores.softmax(-1), bend


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
    longest = max(CHUNK, min(layout.length // 8, LONGEST_CHUNK))
    chunks = []
    streams = KINDS[kind].queries
    for base in range(0, streams * layout.length, layout.length):
        # Tokens that see the same keys stay together.
        clean = kind == "clean" or (kind == "two_stream" and base == 0)
        unit = 1 if clean and layout.clean == "causal" else layout.block_size
        size = max(longest // unit, 1) * unit
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
