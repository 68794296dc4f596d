"""AR and L' = 1 at another depth of the network: one network of each kind, one seed.

More layers are more weights and more computation as well, so the figures do not tell which of the
three narrows the gap.

    for kind in ar L1; do python benchmarks/depth.py runs/paper-mini 10 $kind out; done
    python benchmarks/depth.py out          # the gaps, window by window

Data, tokenizer, tokens and settings are those of the miniature reproduction in the first folder,
seed 0, from scratch; only the number of layers differs.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np

from blockdiff.apps.reproduction.plan import Job, Scale, plan
from blockdiff.apps.reproduction.results import Nats
from blockdiff.apps.reproduction.work import begin_worker, commit, work
from blockdiff.models.config import PRESETS


def measure(run: Path, layers: int, kind: str, out: Path) -> None:
    """Trains and measures one network as the reproduction's jobs do."""
    begin_worker(1)
    PRESETS["nano"]["num_hidden_layers"] = layers
    folder, scale = out / f"{kind}-{layers}", Scale()
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("data", "tokenizer"):
        if not (folder / part).exists():
            (folder / part).symlink_to((run / part).resolve())
    jobs = {job.name: job for job in plan(scale)}
    # AR in one piece, not in a base and the rest.
    settings = jobs["s0-ar-base" if kind == "ar" else "s0-L1"].settings | {"steps": scale.steps}
    train = Job(f"s0-{kind}", "train", (), settings)
    likelihood = jobs[f"s0-{kind}/likelihood"]
    for job in (train, likelihood):
        work(folder, scale, job, commit())


def gaps(out: Path) -> list[dict[str, object]]:
    """The perplexities of both kinds at each depth, and how far L' = 1 is above AR."""
    found = []
    for layers in sorted(int(path.name.split("-")[1]) for path in out.glob("L1-*")):
        pair = []
        for kind in ("ar", "L1"):
            path = out / f"{kind}-{layers}" / "results" / f"s0-{kind}.likelihood.json"
            record = json.loads(path.read_text(encoding="utf-8"))
            pair.append(Nats(np.array(record["nats"]), np.array(record["tokens"], float), 1))
        gap, error = pair[1].minus(pair[0])
        found.append({
            "layers": layers, "ar": pair[0].rate.perplexity, "L1": pair[1].rate.perplexity,
            "above": math.expm1(gap), "stderr": math.exp(gap) * error,
        })  # fmt: skip
    return found


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(gaps(Path(sys.argv[1])), indent=1))
    elif len(sys.argv) == 5 and sys.argv[3] in ("ar", "L1"):
        measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
    else:
        sys.exit(__doc__)
