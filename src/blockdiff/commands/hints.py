"""What other programs call our options and commands, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from blockdiff.sampling.options import ALIASES

# Ours → theirs. A word may stand for several of ours: the first the command has is meant.
_OPTIONS = {
    "samples": "n n-samples num-samples num-return-sequences samples-per-prompt count number num",
    "windows": "limit num-windows n-windows max-samples n-samples num-samples num-sequences",
    "max-new-tokens": (
        "gen-length gen-len gen-tokens max-tokens max-length max-len new-tokens tokens "
        "n-predict num-tokens response-length generation-length length n-tokens max-gen-len"
    ),
    "length": (
        "context-length context-len context-size context ctx ctx-len ctx-size n-ctx seq-len "
        "seq-length sequence-length max-seq-len max-seq-length max-length model-length"
    ),
    "block-size": "block-length block-len block canvas-length canvas-size",
    "block-sizes": "block-size block-length block-len block canvas-length",
    "steps": (
        "num-steps n-steps max-steps train-steps training-steps num-train-steps total-steps "
        "iterations iters max-iters epochs epoch num-epochs max-epochs num-train-epochs nfe "
        "denoising-steps num-denoising-steps max-denoising-steps diffusion-steps sampling-steps "
        "steps-per-block num-inference-steps"
    ),
    "timesteps": "num-timesteps n-timesteps diffusion-timesteps",
    "lr": "learning-rate learningrate learn-rate max-lr peak-lr",
    "lr-schedule": "lr-scheduler lr-scheduler-type scheduler lr-decay",
    "schedule": "noise noise-schedule noise-type mask-schedule",
    "warmup": "warmup-steps num-warmup-steps lr-warmup lr-warmup-steps",
    "weight-decay": "wd l2",
    "max-grad-norm": "grad-clip clip-grad clip-grad-norm gradient-clip gradient-clip-val max-norm",
    "ema": "ema-decay",
    "accumulate": (
        "grad-accum gradient-accumulation gradient-accumulation-steps accumulation-steps "
        "accumulate-grad-batches grad-accumulation-steps"
    ),
    "batch-size": (
        "b bs batch batchsize train-batch-size per-device-train-batch-size micro-batch-size "
        "global-batch-size eval-batch-size"
    ),
    "out": (
        "o output output-dir output-folder output-path outdir out-dir out-folder save-dir save- "
        "path run-dir log-dir logdir checkpoint-dir output-file destination"
    ),
    "model": (
        "m model-path model-name model-name-or-path model-id checkpoint checkpoint-path ckpt "
        "ckpt-path pretrained pretrained-model model-args load"
    ),
    "init-from": (
        "model model-path model-name model-name-or-path checkpoint ckpt pretrained pretrained- "
        "model from-pretrained load init-from-checkpoint base-model start-from"
    ),
    "judge": "model judge-model eval-model",
    "data": (
        "d dataset dataset-name dataset-path data-path data-dir data-file train-data train-file "
        "train-files corpus text texts text-file input input-file file files"
    ),
    "texts": "dataset datasets data tasks task corpus corpora text files input",
    "reference": "data dataset references corpus real-text",
    "prompt": "p text input query question message instruction",
    "prompt-file": "prompts prompts-file prompt-path input-file file f",
    "system": "system-prompt system-message sys instructions",
    "show-denoising": "watch live denoising visualize animate",
    "temperature": "t temp",
    "top-k": "k",
    "top-p": "p nucleus nucleus-p typical-p",
    "sampler": "algorithm strategy decoding sampling-method method",
    "stop": "stop-token stop-tokens stop-sequences stopping eos eos-token",
    "seed": "s random-seed rng-seed manual-seed random-state",
    "precision": (
        "dtype torch-dtype weight-dtype mixed-precision bf16 fp16 fp32 half quantization int8"
    ),
    "device": "gpu cuda cpu mps accelerator device-map gpus",
    "preset": "model-size size arch architecture network model-config",
    "workers": (
        "j jobs num-workers n-workers dataloader-num-workers num-processes processes threads"
    ),
    "log-every": "logging-steps log-interval log-steps log-freq",
    "eval-every": (
        "eval-steps eval-interval val-interval val-every val-check-interval validate-every "
        "eval-freq"
    ),
    "save-every": "save-steps save-interval checkpoint-every checkpoint-interval save-freq",
    "eval-windows": "eval-iters eval-samples limit max-eval-samples",
    "resume": "continue resume-from resume-from-checkpoint resume-training resume-run",
    "overwrite": "force overwrite-output-dir overwrite-out replace yes",
    "objective": "loss mode model-type parameterization",
    "estimator": "loss sampling-mode mask-sampling",
    "estimators": "estimator",
    "backend": "attn attention attn-backend attn-implementation attention-backend flash-attention",
    "json": "format output-format as-json",
    "page": "html out output output-file",
    "plot": "figure png out output output-file",
    "watch": "live stream interactive animate visualize",
    "draws": "mc mc-num mc-samples num-draws n-draws monte-carlo-samples num-mc-samples",
    "validation-fraction": (
        "val-fraction val-split val-size test-size validation-size eval-fraction"
    ),
    "validation-data": (
        "val-data eval-data valid-data val-file eval-file validation-file eval-dataset"
    ),
    "format": "data-format dataset-format data-type dataset-type prompt-format",
    "chat-template": "template template-file jinja chat-format",
    "grow": "curriculum block-curriculum grow-block-size growing",
    "block-weights": "block-size-weights block-probabilities block-shares",
    "text-column": "column text-key text-field field key column-name",
    "subset": "name dataset-config dataset-config-name config-name hf-subset",
    "split": "dataset-split data-split",
    "vocab-size": "vocab n-vocab vocabulary vocabulary-size num-tokens",
    "tokenizer": "tok tokenizer-path tokenizer-name tokenizer-name-or-path",
    "report-to": "wandb tensorboard logger log-to",
    "minutes": "time duration max-time time-limit max-minutes timeout",
    "window": "window-size context-length context max-length stride",
    "compile": "torch-compile torchcompile",
    "checkpoint-activations": (
        "gradient-checkpointing activation-checkpointing checkpointing recompute"
    ),
    "clip": "clip-range clip-rates clip-schedule",
    "repeats": "n num-repeats iterations iters trials runs",
    "config": "c yaml config-file config-path",
    "smoke": "quick fast test dry-run small",
}
_COMMANDS = {
    "generate": "sample gen infer inference predict write complete completion run text prompt",
    "evaluate": (
        "eval evaluation perplexity ppl likelihood loglikelihood score test measure validate "
        "val bpb"
    ),
    "batch": "ray cluster bulk offline distribute distributed map many",
    "chat": "talk converse conversation dialog dialogue interactive repl ask assistant",
    "train": "fit pretrain pre-train finetune fine-tune training learn sft",
    "zero-shot": "zeroshot zero",
    "evaluate-samples": "eval-samples judge mauve genppl gen-ppl quality sample-eval score-samples",
    "variance": "var noise",
    "tune": "tuning autotune calibrate sweep frontier pareto search optimize optimise",
    "tokenizer": "tokenize tokenise tok train-tokenizer bpe",
    "benchmark": "bench speed time timing profile",
    "demo": "quickstart tutorial example try",
    "reproduce": "repro reproduction paper paper-mini replicate",
}


def hint_option(word: str, known: Collection[str]) -> str | None:
    """The option of `known` (with dashes inside, none before) that `word` may stand for."""
    aliases = {theirs.replace("_", "-"): ours for theirs, ours in ALIASES.items()}
    plain = word.strip("-").replace("_", "-").lower()
    ours = aliases.get(plain, "").replace("_", "-")
    return ours if ours in known and plain not in known else _hint(word, known, _OPTIONS)


def hint_command(word: str, known: Collection[str]) -> str | None:
    """The command that `word` may stand for."""
    return _hint(word, known, _COMMANDS)


def _hint(word: str, known: Collection[str], aliases: Mapping[str, str]) -> str | None:
    word = word.strip("-").replace("_", "-").lower()
    if word in known:
        return word
    for ours, theirs in aliases.items():
        if ours in known and word in theirs.split():
            return ours
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    begun = [name for name in known if len(word) > 2 and name.startswith(word)]
    return begun[0] if len(begun) == 1 else None
