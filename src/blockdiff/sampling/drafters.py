"""What drafts the tokens that `verified` tries: the logits of q, one token after the other.

    masks   a block of the model itself. Its positions do not know of one another, and that is what
            most drafts are refused for; so each is joined to the token before it, by the model's
            chain where it has one, else by n-grams:
            logits + 0.9 log(1 + n_bv / u_b q(v)) + 0.6 log(1 + n_abv / 4 u_ab q(v | b))
    table   n-grams alone (`models.ngrams`): no columns in the network

The weights were the best of those tried, on one model (docs/decoding.md); the block knows already
some of what n-grams say, so that they are below 1.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blockdiff.categorical import Array
from blockdiff.models.denoiser import Denoiser
from blockdiff.models.ngrams import Grams
from blockdiff.sampling.options import SamplingOptions

JOINED = 0.9, 0.6
# As many drafts as pay on a CPU: a block of k masks takes (k + 1)² columns, a table k + 1.
DRAFTS = {"masks": 3, "table": 4}


def drafter_of(options: SamplingOptions, model: Denoiser) -> str:
    """What drafts: "masks", or "table" for a model without masked blocks.

    And for one with a draft table and no chain: as many drafts are accepted, for fewer columns.
    """
    if options.drafter not in (None, "auto"):
        return str(options.drafter)
    better = model.draft_table is not None and model.chain is None
    return "table" if better or max(model.config.block_sizes) == 1 else "masks"


def drafts_of(options: SamplingOptions, model: Denoiser) -> int:
    """k: as many as asked for; else those that pay, as far as the model's blocks have room."""
    drafter = drafter_of(options, model)
    room = max(model.config.block_sizes) - (model.config.prediction == "shift")
    if options.drafts is not None:
        return options.drafts
    most = DRAFTS[drafter]
    return most if drafter == "table" else max(1, min(most, room))


def joins(options: SamplingOptions, model: Denoiser) -> bool:
    """Whether n-grams have a part in the drafts."""
    return drafter_of(options, model) == "table" or model.chain is None


def drafted(
    model: Denoiser, masked: Tensor | None, grams: Sequence[Grams], before: tuple[Array, Array]
) -> Tensor:
    """Logits [n, V] of the drafts behind the tokens `before`, the last but one and the last, [n].

    `masked` [n, V]: what the network says at the masked positions, where it drafts. `grams`: of
    each row, where they have a part.
    """
    if masked is not None and model.chain is not None:
        return masked + model.chain(torch.from_numpy(before[1]).to(masked.device)).float()
    if masked is None:
        whole = np.log(np.stack([one.single for one in grams]))
        found, weights = torch.from_numpy(whole).float().to(model.device), (1.0, 1.0)
    else:
        found, weights = masked.clone(), JOINED
    pairs = zip(grams, *(part.tolist() for part in before), strict=True)
    parts = [one.seen(a, b, weights) for one, a, b in pairs]
    owner = np.repeat(np.arange(len(parts)), [len(index) for index, _ in parts])
    index = np.stack([owner, np.concatenate([index for index, _ in parts])])
    row, column = torch.from_numpy(index).to(found.device)
    gain = torch.from_numpy(np.concatenate([gain for _, gain in parts])).float()
    return found.index_put_((row, column), gain.to(found.device), accumulate=True)
