"""The obvious way, as the paper describes it: the baseline every speed is measured against.

Training: one pass over all 2L tokens under the whole 2L × 2L mask, logits over the whole vocabulary
at all 2L positions, the SUBS edit on the full logits, float32 or whatever its caller's autocast
says. Sampling: at each step the whole
vocabulary at every position of the block in float64, a sorted nucleus for each, one position fixed,
and a pass of its own to cache a finished block. It shares the fast path's weights, never its
shortcuts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdiff.attention.masks import dense_mask
from blockdiff.categorical import real_dtype
from blockdiff.models.dit import DiT
from blockdiff.models.layers import DiTLayer, rope
from blockdiff.noising import Draw


def naive_nats(model: DiT, x_0: Tensor, draw: Draw) -> Tensor:
    """What `objectives.bd3lm` gives, [B, L], for a draw of one noised copy per sequence."""
    length = x_0.shape[1]
    log_p = naive_log_probabilities(model, draw.x_t, x_0)[:, length:]
    nll = -log_p.gather(-1, x_0[..., None]).squeeze(-1)
    return nll * draw.weight


def naive_log_probabilities(model: DiT, x_t: Tensor, x_0: Tensor) -> Tensor:
    """log p_θ [B, 2L, V] under SUBS over x_0 ⊕ x_t."""
    layout = model.config.layout
    mask = dense_mask(layout, "two_stream", x_0.device)
    tokens = torch.cat([x_0, x_t], dim=1)
    position = torch.arange(layout.length, device=x_0.device).repeat(2)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    logits = _logits(model, tokens, position, attend)
    return _subs(logits, tokens, model.config.mask_token_id)


@torch.inference_mode()
def naive_sample(model: DiT, prompt: list[int], new: int, top_p: float) -> tuple[list[int], int]:
    """Prompt and what follows it in whole blocks, first-hitting; and the number of evaluations."""
    size, mask_token_id = model.config.block_size, model.config.mask_token_id
    cached: list[tuple[Tensor, Tensor]] | None = None
    text, evaluations, device = list(prompt), 0, model.device
    for start in range(0, len(text) // size * size, size):
        x = torch.tensor([text[start : start + size]], device=device)
        position = torch.arange(start, start + size, device=device)
        cached = naive_step(model, x, position, cached)[1]
        evaluations += 1
    while len(text) < len(prompt) + new:
        start = len(text) // size * size
        x = torch.full((1, size), mask_token_id, device=device)
        x[0, : len(text) - start] = torch.tensor(text[start:], dtype=torch.int64, device=device)
        position = torch.arange(start, start + size, device=device)
        while bool((x == mask_token_id).any()):
            p = naive_step(model, x, position, cached)[0]
            evaluations += 1
            drawn = torch.multinomial(_nucleus(p, top_p)[0], 1).squeeze(-1)
            masked = (x[0] == mask_token_id).nonzero().squeeze(-1)
            chosen = masked[torch.randint(len(masked), ())]
            x[0, chosen] = drawn[chosen]
        cached = naive_step(model, x, position, cached)[1]
        evaluations += 1
        text = text[:start] + x[0].tolist()
    return text, evaluations


def naive_step(
    model: DiT, x: Tensor, position: Tensor, cached: list[tuple[Tensor, Tensor]] | None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """p_θ [1, K, V] of a block x [1, K] in `real_dtype`, and the cache with the block's own."""
    grown: list[tuple[Tensor, Tensor]] = []

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cached is not None:
            k = torch.cat([cached[i][0], k], dim=2)
            v = torch.cat([cached[i][1], v], dim=2)
        grown.append((k, v))
        return F.scaled_dot_product_attention(q, k, v)

    logits = _logits(model, x, position, attend).to(real_dtype(x.device))
    return _subs(logits, x, model.config.mask_token_id).exp(), grown


def _nucleus(p: Tensor, top_p: float) -> Tensor:
    """Each row of p [.., V] cut to its smallest set that reaches top_p."""
    ordered, index = p.sort(dim=-1, descending=True)
    keep = ordered.cumsum(-1) - ordered < top_p
    p = torch.zeros_like(p).scatter(-1, index, ordered * keep)
    return p / p.sum(-1, keepdim=True)


def _logits(
    model: DiT,
    tokens: Tensor,
    position: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The network in plain operators, [B, T, V]."""
    cos, sin = rope(position, model.config.hidden_size // model.config.num_attention_heads)
    # One σ a sequence, as the paper feeds it, though it is the same 0 everywhere.
    sigma = torch.zeros(len(tokens), device=tokens.device)
    condition = None if model.sigma is None else model.sigma(sigma)
    h = model.embedding(tokens)
    for i, layer in enumerate(cast(list[DiTLayer], model.layers)):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulations(layer, condition)
        x = _norm(h, layer.norm_1.weight) * (1 + scale_1) + shift_1
        q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = attend(i, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
        attended = layer.attention_out(attended.transpose(1, 2).flatten(2))
        h = h + gate_1 * F.dropout(attended, layer.dropout, layer.training)
        x = _norm(h, layer.norm_2.weight) * (1 + scale_2) + shift_2
        x = layer.mlp_out(F.gelu(layer.mlp_in(x), approximate="tanh"))
        h = h + gate_2 * F.dropout(x, layer.dropout, layer.training)
    x = _norm(h, model.output.norm.weight)
    if model.output.modulation is not None:
        shift, scale = model.output.modulation(condition)[:, None].chunk(2, dim=-1)
        x = x * (1 + scale) + shift
    return model.output.linear(x)


def _modulations(layer: DiTLayer, condition: Tensor | None) -> tuple[Tensor, ...]:
    """Shift, scale and gate of attention, then of the MLP, for every sequence: [B, 1, E] each."""
    if layer.modulation is None:
        zero, one = layer.norm_1.weight.new_zeros(1), layer.norm_1.weight.new_ones(1)
        return zero, zero, one, zero, zero, one
    return layer.modulation(condition)[:, None].chunk(6, dim=-1)


def _norm(h: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(h, weight.shape, weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of x [..., D]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _subs(logits: Tensor, tokens: Tensor, mask_token_id: int) -> Tensor:
    """The mask token gets probability 0; a token that is not masked stays, with probability 1."""
    logits = logits.clone()
    logits[..., mask_token_id] = -torch.inf
    log_p = logits.log_softmax(-1)
    known = tokens != mask_token_id
    certain = torch.full_like(log_p, -torch.inf).scatter(-1, tokens[..., None], 0.0)
    return torch.where(known[..., None], certain, log_p)
