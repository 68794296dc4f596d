"""What a benchmark can be told; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass

from blockdiff.errors import InputError
from blockdiff.training.config import CHOICES


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time a training step: ours against the naive one, and AR beside them.

    Attributes:
        preset: Network size: nano, micro, small or medium.
        vocab_size: Vocabulary, mask token included.
        length: Context L.
        block_size: Block size L'.
        batch_size: Sequences per step.
        precision: Ours: auto, float32 or bf16; the naive step is always float32.
        backend: Attention of ours: auto, blockwise, flex or dense.
        compile: Compile our layers.
        repeats: Timed repeats of each alternative.
        json: Print one JSON object.
    """

    preset: str = "nano"
    vocab_size: int = 1024
    length: int = 128
    block_size: int = 4
    batch_size: int = 16
    precision: str = "auto"
    backend: str = "auto"
    compile: bool = False
    repeats: int = 5
    json: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes below 1 and unknown names."""
        for name in ("vocab_size", "length", "block_size", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("preset", "precision", "backend"):
            if getattr(self, name) not in CHOICES[name]:
                raise InputError(
                    f"no {name} {getattr(self, name)!r}; choose one of {', '.join(CHOICES[name])}"
                )
