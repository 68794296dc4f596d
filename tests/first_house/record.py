"""What models, samples, losses and a run were before the rooms were rebuilt.

`python tests/first_house/record.py` wrote the folders and golden.json beside this file, once, with
version 0.1.0; tests/test_first_house.py computes the same again and compares. Everything goes
through the package's public names, which outlive the rooms.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import blockdiff

HERE = Path(__file__).parent
VOCABULARY = 270
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "cond_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "ar": {"causal": True},
    "bd3lm": {"block_size": 4},
    "plain": {"block_size": 4, "adaln": False},
    "timed": {"block_size": 4, "time_conditioning": True},
    "mdlm": {"block_size": 16},
    "sedd": {"block_size": 16, "score": True, "time_conditioning": True},
}
PROMPTS = [[0, 70, 81], [0, 99, 100, 101, 102, 103, 104, 105, 9], [0], [0, 7, 8, 9, 10, 11]]
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "past the context": {"max_new_tokens": 30, "stop": "none"},
    "top_p": {"top_p": 0.8, "temperature": 0.7, "seed": 5},
    "paper": {"top_p": 0.9, "top_p_rule": "paper", "stop": "paper", "max_new_tokens": 20},
    "greedy": {"temperature": 0, "top_k": 3},
    "top_k": {"top_k": 5, "seed": 2},
}
ANCESTRAL: dict[str, dict[str, Any]] = {
    "ancestral": {"sampler": "ancestral", "steps": 3},
    "ancestral, cosine": {"sampler": "ancestral", "steps": 8, "schedule": "cosine", "seed": 3},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "blocks of 2": {"block_size": 2, "max_new_tokens": 20, "stop": "none"},
    "blocks of 8": {"block_size": 8, "seed": 4},
}
LIKELIHOODS: dict[str, dict[str, Any]] = {
    "auto": {},
    "exact_k": {"estimator": "exact_k", "draws": 4, "seed": 1},
    "bernoulli": {"estimator": "bernoulli", "draws": 3, "schedule": "cosine"},
    "paired": {"estimator": "paired", "draws": 2},
    "d3pm": {"estimator": "d3pm", "draws": 2, "timesteps": 50},
}
TRAINING: dict[str, dict[str, Any]] = {
    "ar": {"objective": "ar", "init_from": "ar"},
    "bd3lm": {"init_from": "bd3lm"},
    "from ar": {"init_from": "ar", "initial_shift": 0.1},
    "clipped": {"init_from": "bd3lm", "estimator": "clipped", "clip": "0.3,0.8"},
    "redrawn, searched": {
        "init_from": "plain",
        "adaln": False,
        "estimator": "clipped_redraw",
        "clip": "auto",
        "eval_every": 2,
    },
    "timed, paired": {"init_from": "timed", "time_conditioning": True, "estimator": "paired"},
    "mdlm, padded": {
        "objective": "mdlm",
        "init_from": "mdlm",
        "estimator": "bernoulli",
        "schedule": "cosine",
        "across_documents": False,
        # Its clean stream, which nothing read, is gone and with it the dropout it drew.
        "dropout": 0.0,
    },
    "sedd": {"objective": "sedd", "init_from": "sedd", "accumulate": 2, "dropout": 0.0},
}
COMMON: dict[str, Any] = {
    "data": "text.jsonl",
    "length": 16,
    "batch_size": 4,
    "steps": 4,
    "log_every": 1,
    "save_every": 2,
    "lr": 1e-2,
    "warmup": 2,
    "ema": 0.5,
    "eval_windows": 4,
    "report_to": "none",
    "precision": "float32",
    "device": "cpu",
    "seed": 7,
}


def sampling_cases(kind: str) -> dict[str, dict[str, Any]]:
    """The options to sample a model with, by name."""
    cases = SAMPLING if kind != "sedd" else {k: v for k, v in SAMPLING.items() if "past" not in k}
    if kind == "sedd":
        short = {"max_new_tokens": 7}
        cases = {name: {**options, **short} for name, options in cases.items()}
        cases |= {"analytic": {"sampler": "analytic", "steps": 6, **short}}
    if kind in ("bd3lm", "plain", "timed"):
        cases = cases | ANCESTRAL | BLOCKS | {"blocks of 1": {"block_size": 1, "seed": 6}}
    if kind == "ar":
        cases = cases | {"blocks of 4": BLOCKS["blocks of 8"] | {"block_size": 4}}
    if kind == "mdlm":
        cases = cases | ANCESTRAL
    return cases


def sample(model: blockdiff.DiT, options: dict[str, Any]) -> dict[str, Any]:
    """Rows as `stream` leaves them, and how many tokens each evaluation fixed of each row."""
    steps = list(blockdiff.stream(model, PROMPTS, options={"max_new_tokens": 13, **options}))
    last = steps[-1]
    rows = [row[:end].tolist() for row, end in zip(last.tokens, last.lengths, strict=True)]
    evaluated = [
        [fixed for counted, fixed in of_row if counted]
        for of_row in zip(
            *(
                zip((b.nfe > a.nfe).tolist(), b.fixed.sum(-1).tolist(), strict=True)
                for a, b in pairwise([None, *steps])
                if b is not None and a is not None
            ),
            strict=True,
        )
    ]
    return {
        "rows": rows,
        "nfe": last.nfe.tolist(),
        "rejected": last.rejected.tolist(),
        "fixed": evaluated,
    }


def measure(model: blockdiff.DiT, options: dict[str, Any]) -> list[float]:
    """Nats of four sequences."""
    x_0 = torch.arange(4)[:, None] * 37 + torch.arange(16) * 11
    return blockdiff.likelihood(model, x_0 % (VOCABULARY - 1), **options).nats.tolist()


def train(options: dict[str, Any], out: Path) -> list[dict[str, float]]:
    """The metrics of a short run in the current folder, which holds the models and the text."""
    blockdiff.train(blockdiff.TrainConfig(out=str(out), **{**COMMON, **options}), progress=False)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    wanted = ("step", "loss", "eval_", "clip_")
    return [{k: v for k, v in line.items() if k.startswith(wanted)} for line in lines]


def _write_text(path: Path) -> None:
    line = "the model fills masked tokens in a block from left to right and reads clean text"
    words = line.split()
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(60):
        count = int(torch.randint(3, 14, (), generator=generator))
        chosen = torch.randint(len(words), (count,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(words[i] for i in chosen) + "."}))
    path.write_text("\n".join(lines) + "\n")


def _write_models() -> None:
    from blockdiff.data.tokenizers import train_tokenizer

    texts = [json.loads(line)["text"] for line in (HERE / "text.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    for number, (kind, settings) in enumerate(MODELS.items()):
        config = blockdiff.DiTConfig(
            vocab_size=len(tokenizer),
            length=16,
            dropout=0.0,
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **SIZES,
            **settings,
        )
        torch.manual_seed(number)
        model = blockdiff.DiT(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in name else 0.25))
            model.output.linear.bias[tokenizer.eos_token_id] += 2.5  # some rows end early
        blockdiff.save_model(model, HERE / "models" / kind, tokenizer)


if __name__ == "__main__":
    import os

    os.chdir(HERE)
    _write_text(HERE / "text.jsonl")
    _write_models()
    golden: dict[str, Any] = {"sampling": {}, "likelihood": {}, "training": {}}
    for kind in MODELS:
        model = blockdiff.load(HERE / "models" / kind)[0]
        cases = sampling_cases(kind)
        golden["sampling"][kind] = {name: sample(model, cases[name]) for name in cases}
        some = {"auto"} if kind == "ar" else set(LIKELIHOODS)
        golden["likelihood"][kind] = {
            name: measure(model, options) for name, options in LIKELIHOODS.items() if name in some
        }
    os.chdir(HERE / "models")
    shutil.copy(HERE / "text.jsonl", "text.jsonl")
    for name, options in TRAINING.items():
        golden["training"][name] = train(options, Path("run"))
        shutil.rmtree("run")
    os.remove("text.jsonl")
    os.chdir(HERE)
    start = {**TRAINING["bd3lm"], "init_from": "models/bd3lm"}
    blockdiff.train(blockdiff.TrainConfig(out="run", **{**COMMON, **start}), progress=False)
    (HERE / "golden.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
