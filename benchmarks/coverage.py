"""Whether `mask_stderr` is the noise of the masks: each estimator measured over and over.

    python benchmarks/coverage.py    # 15 minutes on a core; benchmarks/results/coverage.json

200 repeats that differ in the seed of the masks alone, of a small network with drawn weights, so
that what is masked matters, on 40 windows of 32 drawn tokens, 8 draws each: at L' = 4 against the
enumerated bound, at L' = 16 against the mean of all repeats, as d3pm, whose bound is another.

`ratio` is claimed over actual: the root mean square of `mask_stderr` over the repeats' standard
deviation, which has 5% of error from 200 repeats. `coverage` is how often the measured value ± 1.96
`mask_stderr` holds the bound; 95% would have 1.5 points of error. `if_independent` is the ratio
that the spread of single draws would claim, the draws being stratified.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import patch

import torch

from blockdiff.evaluation import likelihood as module
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT

RESULTS = Path(__file__).parent / "results" / "coverage.json"
REPEATS, WINDOWS, LENGTH, DRAWS = 200, 40, 32, 8
CASES = {4: ("exact_k", "paired", "bernoulli", "d3pm"), 16: ("exact_k", "paired")}


def measure(model, x_0, estimator: str, size: int, repeats: int = REPEATS) -> dict[str, object]:
    """The ratio and the coverage of one estimator at one block size."""
    found, naive = [], []
    for seed in range(repeats):
        with patch.object(module, "_summary", wraps=module._summary) as spy:
            found.append(likelihood(model, x_0, estimator, DRAWS, seed, block_size=size))
        per_draw, tokens = spy.call_args.args[:2]
        naive.append((per_draw.var(0) / DRAWS).sum().item() / tokens.sum().item() ** 2)
    values = torch.tensor([one.nats_per_token for one in found], dtype=torch.float64)
    claimed = torch.tensor([one.mask_stderr for one in found], dtype=torch.float64)
    exact = size == 4 and estimator != "d3pm"
    bound = likelihood(model, x_0, "enumerate", block_size=size) if exact else None
    centre = values.mean().item() if bound is None else bound.nats_per_token
    covered = ((values - centre).abs() <= 1.96 * claimed).double().mean().item()
    actual = values.std().item()
    return {
        "estimator": estimator,
        "block_size": size,
        "bound": None if bound is None else centre,
        "mean": values.mean().item(),
        "actual": actual,
        "ratio": claimed.square().mean().sqrt().item() / actual,
        "coverage": covered,
        "coverage_stderr": math.sqrt(max(covered * (1 - covered), 1 / repeats) / repeats),
        "if_independent": math.sqrt(sum(naive) / repeats) / actual,
    }


def drawn_network() -> DiT:
    torch.manual_seed(0)
    network = DiT(
        DiTConfig(9, LENGTH, 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                  cond_size=8, dropout=0.0, initial_gate=1.0)
    ).eval()  # fmt: skip
    for name, weights in network.named_parameters():
        if weights.dim() > 1 and "modulation" not in name:
            torch.nn.init.normal_(weights, std=0.5)
    return network


def main() -> None:
    network = drawn_network()
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(network.config.mask_token_id, (WINDOWS, LENGTH), generator=generator)
    record: dict[str, object] = {
        "windows": WINDOWS, "length": LENGTH, "draws": DRAWS, "repeats": REPEATS
    }  # fmt: skip
    found = []
    for size, estimators in CASES.items():
        for estimator in estimators:
            found.append(measure(network, x_0, estimator, size))
            print(found[-1], flush=True)
    RESULTS.write_text(json.dumps({**record, "found": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
