"""When a row is finished."""

from __future__ import annotations

import torch
from torch import Tensor


def finished_length(
    tokens: Tensor, starts: Tensor, ends: Tensor, mask_token_id: int, eos_token_id: int | None
) -> Tensor:
    """int64 [n]: the final length of each finished row, −1 where a row goes on.

    `tokens` int64 [n, S], masked where nothing is fixed yet; `starts` and `ends` [n]: the positions
    new text may take. A row ends with the first EOS that has no mask before it (the tokens behind
    it no longer matter), or when everything up to its end is fixed.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    size = tokens.shape[1]
    new = (position >= starts[:, None]) & (position < ends[:, None])
    open_positions = (tokens == mask_token_id) & new
    first_open = torch.where(open_positions, position, size).amin(-1)
    length = torch.where(first_open == size, ends, -1)
    if eos_token_id is not None:
        first_eos = torch.where((tokens == eos_token_id) & new, position, size).amin(-1)
        length = torch.where(first_eos < first_open, (first_eos + 1).minimum(ends), length)
    return length
