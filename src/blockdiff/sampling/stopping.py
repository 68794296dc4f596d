"""When a row is finished.

eos          at the first end-of-text token
second_eos   at the second, the prompt's included (the paper's texts begin with one)
low_entropy  when the last 256 tokens have less than 4 nats: the row is given up
"""

from __future__ import annotations

import torch
from torch import Tensor

# The paper's rule: entropy in nats, over so many tokens.
DULL_NATS, DULL_TOKENS = 4.0, 256


def finished_length(
    tokens: Tensor,
    starts: Tensor,
    ends: Tensor,
    mask_token_id: int,
    eos_token_id: int | None,
    wanted: Tensor | None = None,
) -> Tensor:
    """int64 [n]: the final length of each finished row, −1 where a row goes on.

    `tokens` int64 [n, S], masked where nothing is fixed yet; `starts` and `ends` [n]: the positions
    new text may take. A row ends with the first EOS (or the `wanted`-th, int64 [n]) that has no
    mask before it (the tokens behind it no longer matter), or when everything up to its end is
    fixed.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    size = tokens.shape[1]
    new = (position >= starts[:, None]) & (position < ends[:, None])
    first_open = _first_open(tokens, new, mask_token_id)
    length = torch.where(first_open == size, ends, -1)
    if eos_token_id is not None:
        eos = (tokens == eos_token_id) & new
        if wanted is not None:
            eos &= eos.cumsum(-1) == wanted[:, None]
        first_eos = torch.where(eos, position, size).amin(-1)
        length = torch.where(first_eos < first_open, (first_eos + 1).minimum(ends), length)
    return length


def is_dull(
    tokens: Tensor, starts: Tensor, ends: Tensor, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Whether the last 256 tokens before a row's first mask are dull bool [n], and that mask [n].

    Their entropy is that of the counts of the different tokens among them, in nats. Rows with
    fewer tokens are not.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    new = (position >= starts[:, None]) & (position < ends[:, None])
    known = _first_open(tokens, new, mask_token_id).minimum(ends)
    dull = torch.zeros_like(known, dtype=torch.bool)
    for row in (known >= DULL_TOKENS).nonzero().squeeze(-1).tolist():
        end = int(known[row])
        dull[row] = token_entropy(tokens[row, end - DULL_TOKENS : end]) < DULL_NATS
    return dull, known


def token_entropy(tokens: Tensor) -> float:
    """Entropy in nats of how often each different token occurs among `tokens` [T]."""
    share = torch.unique(tokens, return_counts=True)[1].double() / len(tokens)
    return float(-(share * share.log()).sum())


def _first_open(tokens: Tensor, new: Tensor, mask_token_id: int) -> Tensor:
    """The first masked position of the new text; S where there is none."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where((tokens == mask_token_id) & new, position, tokens.shape[1]).amin(-1)
