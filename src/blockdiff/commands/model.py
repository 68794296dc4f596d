"""The model a command opens, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from blockdiff import checks


@dataclass(frozen=True)
class ModelOptions:
    """A model.

    Attributes:
        model: Model folder or hub id; starter is the one that comes with the package.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
        dtype: Number format the weights are read in: float32, bf16, or auto (that of the files).
        mask_token_id: Id of the mask token, where the folder does not say it.
        block_size: Block size L'; the model's own when left out. Of a folder that does not store
            one, what the model was trained with.
    """

    model: str
    device: str = "auto"
    dtype: Literal["float32", "bf16", "auto"] = "float32"
    mask_token_id: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        """Raises `InputError` for numbers that cannot be meant."""
        checks.options(self, {"mask_token_id": (0, checks.LARGEST_SIZE)}, {})

    @property
    def opening(self) -> dict[str, Any]:
        """What `load` takes of it, but for the device."""
        import torch

        return {
            "dtype": {"float32": torch.float32, "bf16": torch.bfloat16}.get(self.dtype, "auto"),
            "mask_token_id": self.mask_token_id,
            "block_size": self.block_size,
        }
