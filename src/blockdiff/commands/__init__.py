"""The commands, a file each. Nothing heavy is imported before one runs."""

from blockdiff.commands import (
    adapt,
    benchmark,
    chat,
    demo,
    draft_table,
    evaluate,
    evaluate_samples,
    export,
    generate,
    infill,
    reproduce,
    score,
    serve,
    tokenizer,
    train,
    tune,
    variance,
    zero_shot,
)
from blockdiff.commands.options import Command

COMMANDS: dict[str, Command] = {
    "train": train.COMMAND,
    "adapt": adapt.COMMAND,
    "evaluate": evaluate.COMMAND,
    "zero-shot": zero_shot.COMMAND,
    "score": score.COMMAND,
    "variance": variance.COMMAND,
    "evaluate-samples": evaluate_samples.COMMAND,
    "export": export.COMMAND,
    "generate": generate.COMMAND,
    "tune": tune.COMMAND,
    "infill": infill.COMMAND,
    "draft-table": draft_table.COMMAND,
    "chat": chat.COMMAND,
    "serve": serve.COMMAND,
    "tokenizer": tokenizer.COMMAND,
    "benchmark": benchmark.COMMAND,
    "reproduce": reproduce.COMMAND,
    "demo": demo.COMMAND,
}
