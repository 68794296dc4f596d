"""What a benchmark can be told; imports nothing heavy, for the command line's sake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from blockdiff import checks
from blockdiff.errors import InputError
from blockdiff.training.config import Backend, Precision, Preset

Work = Literal["train", "sample", "attention", "evaluate"]
WORKS = get_args(Work)
NAIVE, NAIVE_BF16 = NAIVES = ("naive", "naive, bf16 autocast")
GPT2, GPT2_BF16 = GPTS = ("gpt2", "gpt2, bf16")
WHOLE_NUMBERS = {
    "vocab_size": (2, checks.LARGEST_VOCABULARY),
    "tokens": (1, checks.LARGEST_TEXT),
    "repeats": (1, checks.LARGEST_SIZE),
}
REAL_NUMBERS = {"dropout": (0.0, 1.0, False, True)}


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time ours against the naive way and the baselines, side by side.

    Attributes:
        preset: Network size: nano, micro, small or medium.
        vocab_size: Vocabulary, mask token included.
        length: Context L.
        block_size: Block size L'.
        batch_size: Sequences per step, or rows sampled at once.
        precision: Ours: auto, float32 or bf16; the naive code and GPT-2 run in float32, and beside
            it in bf16 where the device has the instructions.
        backend: Attention of ours: auto, blockwise, flex or dense.
        compile: Compile our layers (train, sample).
        checkpoint_activations: Compute our layers' activations again in the backward (train).
        dropout: Dropout (train).
        tokens: New tokens a row (sample).
        top_p: Top-p cut of every sampler (sample).
        repeats: Timed repeats of each alternative.
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
    checkpoint_activations: bool = False
    dropout: float = 0.1
    tokens: int = 64
    top_p: float = 0.9
    repeats: int = 5
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raises `InputError` for sizes and names that cannot be meant."""
        checks.options(self, WHOLE_NUMBERS, REAL_NUMBERS, smallest=checks.SMALLEST)
        if self.length % self.block_size:
            raise InputError(
                f"`block_size` {self.block_size} does not divide `length` {self.length}; "
                "choose a divisor"
            )
