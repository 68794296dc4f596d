"""Classifier-free guidance: a row and its twin, which has the text but not the prompt.

    logits = un + (s + 1)·(cond − un)      s = `cfg_scale`, as LLaDA writes it (Nie et al. 2025)

cond are the logits of the row, un those of the twin, a hidden row of the engine that is evaluated
beside it and in which every token is fixed that is fixed in the row: one evaluation of two rows.
What the twin has instead of the prompt:

    one window (LLaDA, Dream, MDLM)  as many mask tokens; the first token stays where training never
                                     masks it
    cached blocks and AR             the beginning-of-text token alone, repeated as far as the
                                     blocks of row and twin have to begin at the same tokens: less
                                     than a block more

Shapes: n rows of an evaluation, P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blockdiff.categorical import Array
from blockdiff.errors import InputError
from blockdiff.models.denoiser import Conventions


def prompt_of_twin(config: Conventions, prompt: Sequence[int], size: int) -> list[int]:
    """What stands in the place of a prompt, for blocks of `size`.

    Raises `InputError` for a model that has no logits or no token to begin a text with.
    """
    if config.kind == "sedd":
        raise InputError("`cfg_scale` guides logits, and SEDD gives scores; leave it out")
    if config.length <= size:
        kept = 1 if config.keep_first else 0
        return [*prompt[:kept], *[config.mask_token_id] * (len(prompt) - kept)]
    first = config.eos_token_id if config.bos_token_id is None else config.bos_token_id
    if first is None:
        raise InputError("`cfg_scale` needs a token that begins a text, and the model has none")
    grid = config.prompt_grid == "prompt_end"
    return [first] * (1 if grid else (len(prompt) - 1) % size + 1)


def leaders(names: Array) -> Array:
    """int64 [n]: the place of the row that each of n rows follows; its own where it is no twin.

    `names`: a twin's is −1 − that of its row.
    """
    found = np.arange(len(names))
    for place in (names < 0).nonzero()[0].tolist():
        found[place] = (names == -1 - names[place]).nonzero()[0][0]
    return found


def join(
    logits: Tensor, wanted: Array, leader: Array, scale: Array
) -> tuple[Tensor, Tensor, Array]:
    """(guided logits, the rows' own, `wanted`) of the rows that are no twins.

    `logits` [P, V] of rows and twins, `wanted` bool [n, K] alike in both; `scale` [n]: s.
    """
    twins = (leader != np.arange(len(leader))).nonzero()[0]
    if not len(twins):
        return logits, logits, wanted
    owner = wanted.nonzero()[0]
    place = {row: (owner == row).nonzero()[0] for row in range(len(leader))}
    shown = wanted.copy()
    shown[twins] = False
    kept = (~np.isin(owner, twins)).nonzero()[0]
    other = np.arange(len(owner))
    for twin in twins.tolist():
        other[place[leader[twin]]] = place[twin]
    index = torch.from_numpy(np.stack([kept, other[kept]])).to(logits.device, non_blocking=True)
    own, without = logits[index[0]], logits[index[1]]
    factor = torch.from_numpy(scale[owner[kept]] + 1).to(logits)[:, None]
    alone = index[0] == index[1]  # it has no twin
    guided = torch.where(alone[:, None], own, without + factor * (own - without))
    return guided.masked_fill(own == -torch.inf, -torch.inf), own, shown


def with_twins(
    leader: Array, place: Array, column: Array, tokens: Array
) -> tuple[Array, Array, Array]:
    """What is fixed, [m] each, and the same in the twins of these rows."""
    twin = np.full(len(leader), -1)
    follows = leader != np.arange(len(leader))
    twin[leader[follows]] = follows.nonzero()[0]
    more = twin[place] >= 0
    if not more.any():
        return place, column, tokens
    also = [(place, twin[place[more]]), (column, column[more]), (tokens, tokens[more])]
    place, column, tokens = map(np.concatenate, also)
    return place, column, tokens
