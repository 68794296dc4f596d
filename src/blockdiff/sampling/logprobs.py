"""Log-probabilities of what is fixed, kept beside the rows that ask for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from blockdiff.categorical import Array
from blockdiff.sampling.rows import Rows


def note_logprobs(
    rows: Rows, logits: Tensor, which: tuple[Array, ...], tokens: Array, row: Array, at: Array
) -> None:
    """Keeps log p of m `tokens`, fixed at positions `at` [m] of rows `row` [m]; waits once.

    `which`: the index of each in logits [.., V], by its leading dimensions.
    """
    if rows.logprobs is None:
        return
    asks = np.array([options.logprobs for options, *_ in rows.groups])
    wish = asks[rows.state["group"][row]]
    index = torch.from_numpy(np.stack([*which, tokens])[:, wish]).to(logits.device)
    found = logits[tuple(index[:-1])].log_softmax(-1).gather(-1, index[-1][:, None]).squeeze(-1)
    rows.logprobs[row[wish], at[wish]] = found.double().cpu().numpy()
