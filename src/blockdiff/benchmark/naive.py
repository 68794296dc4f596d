"""The obvious way, as the paper describes it: the baseline every speed is measured against.

One pass over all 2L tokens under the whole 2L × 2L mask, logits over the whole vocabulary at all 2L
positions, the SUBS edit on the full logits, float32. It shares the fast path's weights, never its
shortcuts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blockdiff.layout import dense_mask
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
    cos, sin = rope(position, model.config.hidden_size // model.config.num_attention_heads)
    # One σ a sequence, as the paper feeds it, though it is the same 0 everywhere.
    sigma = torch.zeros(len(x_0), device=x_0.device)
    condition = None if model.sigma is None else model.sigma(sigma)
    h = model.embedding(tokens)
    for layer in model.stack():
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = _modulations(layer, condition)
        x = _norm(h, layer.norm_1.weight) * (1 + scale_1) + shift_1
        q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = layer.attention_out(attended.transpose(1, 2).flatten(2))
        h = h + gate_1 * F.dropout(attended, layer.dropout, layer.training)
        x = _norm(h, layer.norm_2.weight) * (1 + scale_2) + shift_2
        x = layer.mlp_out(F.gelu(layer.mlp_in(x), approximate="tanh"))
        h = h + gate_2 * F.dropout(x, layer.dropout, layer.training)
    x = _norm(h, model.output.norm.weight)
    if model.output.modulation is not None:
        shift, scale = model.output.modulation(condition)[:, None].chunk(2, dim=-1)
        x = x * (1 + scale) + shift
    return _subs(model.output.linear(x), tokens, model.config.mask_token_id)


def _modulations(layer: DiTLayer, condition: Tensor | None) -> tuple[Tensor, ...]:
    """Shift, scale and gate of attention, then of the MLP, for every sequence: [B, 1, E] each."""
    if layer.modulation is None:
        zero, one = torch.zeros(1), torch.ones(1)
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
