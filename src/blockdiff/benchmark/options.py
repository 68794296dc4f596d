"""What a benchmark can be told; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from blockdiff.errors import InputError
from blockdiff.training.config import CHOICES, Backend, Precision, Preset

Work = Literal["train", "sample", "attention", "evaluate"]
WORKS = get_args(Work)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time ours against the naive way and the baselines, side by side.

    Attributes:
        preset: Network size: nano, micro, small or medium.
        vocab_size: Vocabulary, mask token included.
        length: Context L.
        block_size: Block size L'.
        batch_size: Sequences per step, or rows sampled at once.
        precision: Ours: auto, float32 or bf16; what is naive is always float32.
        backend: Attention of ours: auto, blockwise, flex or dense.
        compile: Compile our layers (train, sample).
        dropout: Dropout (train).
        tokens: New tokens a row (sample).
        top_p: Top-p cut of every sampler (sample).
        repeats: Timed repeats of each alternative.
        json: Print one JSON object.
        device: cpu, cuda, cuda:1, mps, or auto (cuda, else mps, else cpu).
    """

    preset: Preset = "nano"
    vocab_size: int = 1024
    length: int = 128
    block_size: int = 4
    batch_size: int = 16
    precision: Precision = "auto"
    backend: Backend = "auto"
    compile: bool = False
    dropout: float = 0.1
    tokens: int = 64
    top_p: float = 0.9
    repeats: int = 5
    json: bool = False
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes below 1 and unknown names."""
        for name in ("vocab_size", "length", "block_size", "batch_size", "tokens", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("preset", "precision", "backend"):
            if getattr(self, name) not in CHOICES[name]:
                raise InputError(
                    f"no {name} {getattr(self, name)!r}; choose one of {', '.join(CHOICES[name])}"
                )
        if not 0 <= self.dropout < 1:
            raise InputError(f"--dropout is {self.dropout}; it must be in [0, 1)")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p is {self.top_p}; it must be above 0 and at most 1")
