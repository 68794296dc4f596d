"""A drafter in a model that stays what it is: low-rank pairs that only noised tokens go through.

    y = W x + 2 B A x   of a noised token,     y = W x   of a clean one

The clean stream is the base model's, bit for bit, and has no gradient. Beside the pairs the mask
token has an embedding of its own. At the start B = 0. Folders keep the base model's files as they
are and DRAFT beside them, with the pairs, that embedding and the chain (`models.chain`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blockdiff.errors import InputError, first_line
from blockdiff.models.passes import noised_from
from blockdiff.models.weights import Linear

DRAFT = "draft.safetensors"
SCALE = 2.0
_MARK = "draft_"  # of the parameters' own names


class GatedLinear(Linear):
    """A linear map with a pair for the columns [b, T, K] that are noised in the current pass."""

    draft_down: Tensor
    draft_up: Tensor

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        out, start = super().forward(x), noised_from()
        # A map that sees tokens without their columns, such as an expert's, has no part in it.
        if start is not None and x.dim() == 3 and start < x.shape[1]:
            inner = F.linear(x[:, start:].to(self.draft_down.dtype), self.draft_down)
            added = (SCALE * F.linear(inner, self.draft_up)).to(out.dtype)
            out = torch.cat([out[:, :start], out[:, start:] + added], dim=1)
        return F.gelu(out, approximate="tanh") if gelu else out


def add_pairs(lm: Any, rank: int, mask_token_id: int) -> None:
    """Pairs of `rank` in every linear map but the output's; raises `InputError` without one."""
    maps = [m for m in lm.get_decoder().modules() if type(m) is Linear]
    if not maps:
        raise InputError(f"{type(lm).__name__} has no linear maps for `draft` to go beside")
    generator = torch.Generator().manual_seed(0)
    for one in maps:
        down = torch.randn(rank, one.in_features, generator=generator) / math.sqrt(one.in_features)
        one.__class__ = GatedLinear
        one.draft_down = nn.Parameter(down.to(one.weight))
        one.draft_up = nn.Parameter(one.weight.new_zeros(one.out_features, rank))
    table = lm.get_input_embeddings()
    table.mask_token_id = mask_token_id
    table.draft_row = nn.Parameter(table.weight[mask_token_id].detach().clone())
    table.register_forward_hook(_with_row)


def _with_row(table: Any, given: tuple[Tensor], embedded: Tensor) -> Tensor:
    row = table.draft_row * getattr(table, "embed_scale", 1.0)
    masked = (given[0] == table.mask_token_id)[..., None]
    return torch.where(masked, row.to(embedded.dtype), embedded)


def is_draft(name: str) -> bool:
    """Whether a parameter of a model belongs to what drafts."""
    return name.startswith("chain.") or name.rpartition(".")[2].startswith(_MARK)


def write_draft(state: dict[str, Tensor], folder: str | Path) -> None:
    """Writes what drafts of a model's `state`."""
    own = {name: x.detach().contiguous() for name, x in state.items() if is_draft(name)}
    save_file(own, Path(folder) / DRAFT, metadata={"format": "pt"})


@torch.no_grad()
def read_draft(model: nn.Module, folder: Path) -> None:
    """Takes what a folder's DRAFT has; raises `InputError` where that does not fit the model."""
    own = {name: p for name, p in model.named_parameters() if is_draft(name)}
    try:
        found = load_file(folder / DRAFT)
    except Exception as error:
        raise InputError(f"{folder / DRAFT} cannot be opened: {first_line(error)}") from None
    for name, tensor in own.items():
        if name not in found or found[name].shape != tensor.shape:
            what = "has another shape" if name in found else "is missing"
            raise InputError(f"{folder / DRAFT} does not fit config.json: {name} {what}")
        if not bool(found[name].isfinite().all()):
            raise InputError(f"{folder / DRAFT}: {name} holds numbers that are not finite")
        tensor.copy_(found[name])
