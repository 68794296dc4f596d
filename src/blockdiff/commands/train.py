"""`blockdiff train`."""

from __future__ import annotations

from blockdiff.commands.options import Command, Given
from blockdiff.training.config import TrainConfig


def _run(given: Given) -> None:
    from blockdiff.plots import loss_plot
    from blockdiff.training.callbacks import METRICS_FILE, read_metrics
    from blockdiff.training.run import train

    result = train(given.make(TrainConfig), given=given.named)
    if not result.is_main_process:
        return
    plot = result.folder / "loss.png"
    if result.steps or not plot.exists():
        lines = {"training": read_metrics(result.folder / METRICS_FILE)}
        loss_plot(lines, plot, title=str(result.folder))
    if not result.steps:
        print(f"{result.folder}: its steps were all done")
    print(
        f"{result.folder}: perplexity {result.metrics['eval_perplexity']:.2f} "
        f"({result.metrics['eval_nats_per_token']:.4f} ± {result.metrics['eval_stderr']:.4f} "
        f"nats per token) after {result.tokens_seen:,} tokens in {result.seconds:.0f} s"
    )


COMMAND = Command(
    summary="Train a model, resume a run, or go on from another model's weights.",
    kinds=(TrainConfig,),
    run=_run,
    places=("data",),
    sections={
        "out": "Run",
        "data": "Text",
        "objective": "Model",
        "estimator": "Masks",
        "steps": "Optimisation",
        "precision": "Machine",
        "log_every": "Log and checkpoints",
    },
    examples=(
        "blockdiff train notes.txt --out runs/notes --steps 2000",
        "blockdiff train --data pydoc --init-from runs/ar --block-size 4 --out runs/bd3lm",
        "blockdiff train notes.txt --block-size 1,4,8 --block-weights 0.3,0.3,0.4 --out runs/sizes",
        "blockdiff train notes.txt --init-from runs/ar --block-size 16 --grow --out runs/grown",
        "blockdiff train chat.jsonl --format chat --init-from runs/base --out runs/chat",
        "blockdiff train --out runs/bd3lm --resume",
        "blockdiff train --config owt/bd3lm-4",
    ),
)
