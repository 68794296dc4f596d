"""How often a sampled token differs in other company, in float32.

    python benchmarks/rounding.py [MODEL]

Rows are written alone, and again beside 15 others: the logits of another batch are rounded
otherwise, and so are the cumulative probabilities that a token is drawn by. A draw differs where
its random number falls between the two values of one of them, so that all these gaps, added up,
are how many of the draws do. Only draws behind the same tokens are compared. The result is
benchmarks/results/rounding.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import blockdiff
from blockdiff.evaluation.statistics import mean_error

RESULTS = Path(__file__).parent / "results" / "rounding.json"
ROWS, NEW, OTHERS = 16, 64, 15


class Seen:
    """Keeps the scores of a row's positions, and leaves them as they are."""

    reads_context = False

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores += scores.clone()
        return scores


def written(model: blockdiff.Denoiser, row: int, others: int) -> tuple[list[int], torch.Tensor]:
    """(the tokens, their scores [n, V]) of a row beside so many others."""
    draw = np.random.default_rng(row)
    seen, engine = Seen(), blockdiff.Engine(model)
    how = {"max_new_tokens": NEW, "stop": "none", "seed": row}
    vocabulary = min(model.config.mask_token_id, model.config.vocab_size)
    prompts = [draw.integers(vocabulary, size=8).tolist() for _ in range(1 + others)]
    name = engine.admit(prompts[0], blockdiff.SamplingOptions(logits_processor=[seen], **how))
    for prompt in prompts[1:]:
        engine.admit(prompt, blockdiff.SamplingOptions(**how))
    while engine.active:
        step = engine.step()
    (at,) = (step.rows == name).nonzero()[:, 0].tolist()
    return step.tokens[at, 8 : 8 + NEW].tolist(), torch.stack(seen.scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="starter")
    source = parser.parse_args().model
    model, _ = blockdiff.load(source, device="cpu")
    sums, largest, same = [], [], 0
    for row in range(ROWS):
        (tokens, alone), (again, beside) = (written(model, row, n) for n in (0, OTHERS))
        same += tokens == again
        if tokens != again:  # what comes after the first other token has other logits
            continue
        # Added up as the sampler does, in float64.
        sums_of = (one.softmax(-1).cumsum(-1, dtype=torch.float64) for one in (alone, beside))
        ends = [one / one[:, -1:] for one in sums_of]
        gaps = (ends[0] - ends[1]).abs()
        sums += gaps.sum(-1).tolist()
        largest += gaps.amax(-1).tolist()
    found = np.array(sums)
    record = {
        "model": source, "vocabulary": model.config.vocab_size, "others": OTHERS,
        "texts": ROWS, "texts_alike": same, "draws": len(found),
        "share_of_draws": float(found.mean()), "stderr": mean_error(found),
        "largest_gap": float(np.mean(largest)),
        "gap": float(found.mean() / model.config.vocab_size),
        "texts_of_128_tokens": float(1 - (1 - found.mean()) ** 128),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
