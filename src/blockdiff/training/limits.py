"""The ranges of the numbers in a training run's configuration."""

from __future__ import annotations

from blockdiff import checks

# option → the least and the most it can be, both included
WHOLE_NUMBERS: dict[str, tuple[int, int]] = {
    "vocab_size": (1, checks.LARGEST_VOCABULARY),
    "length": (1, checks.LARGEST_SIZE),
    "block_size": (1, checks.LARGEST_SIZE),
    "lora": (1, checks.LARGEST_SIZE),
    "chain_rank": (0, checks.LARGEST_SIZE),
    "timesteps": (1, checks.LARGEST_SIZE),
    "steps": (1, checks.LARGEST_SIZE),
    "batch_size": (1, checks.LARGEST_SIZE),
    "accumulate": (1, checks.LARGEST_SIZE),
    "warmup": (0, checks.LARGEST_SIZE),
    "seed": checks.SEEDS,
    "workers": (0, 1024),
    "log_every": (1, checks.LARGEST_SIZE),
    "eval_every": (0, checks.LARGEST_SIZE),
    "eval_windows": (0, checks.LARGEST_SIZE),
    "eval_draws": (1, checks.LARGEST_SIZE),
    "save_every": (1, checks.LARGEST_SIZE),
    "keep_last": (1, checks.LARGEST_SIZE),
    "keep_every": (0, checks.LARGEST_SIZE),
}
# option → the ends of its range, and whether each end itself is left out
REAL_NUMBERS: dict[str, tuple[float, float, bool, bool]] = {
    "validation_fraction": (0, 1, True, True),
    "initial_shift": (0, 1000, False, False),
    "minutes": (0, 1e9, False, False),
    "lr": (0, 10, True, False),
    "weight_decay": (0, 1000, False, False),
    "max_grad_norm": (0, 1e9, False, False),
    "dropout": (0, 1, False, True),
    "ema": (0, 1, False, True),
    "ar_weight": (0, 1000, False, False),
}
