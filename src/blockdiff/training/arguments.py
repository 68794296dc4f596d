"""transformers' arguments for a run: what our options set, and what passes through to them."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from blockdiff.checks import one_of
from blockdiff.errors import InputError, need
from blockdiff.models.weights import resolve_precision
from blockdiff.training import parallel
from blockdiff.training.config import TrainConfig

# Fields of `TrainingArguments` that are not for `trainer_args`: the option that sets each, or none
# where what it does would not be this package's training any more.
_OWNED = {
    "output_dir": "out", "max_steps": "steps", "num_train_epochs": "steps",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "accumulate",
    "auto_find_batch_size": "batch_size", "learning_rate": "lr", "lr_scheduler_type": "lr_schedule",
    "warmup_steps": "warmup", "warmup_ratio": "warmup", "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm", "bf16": "precision", "fp16": "precision",
    "use_cpu": "device", "seed": "seed", "data_seed": "seed", "logging_strategy": "log_every",
    "logging_steps": "log_every", "save_strategy": "save_every", "save_steps": "save_every",
    "save_total_limit": "keep_last", "eval_strategy": "eval_every", "eval_steps": "eval_every",
    "dataloader_num_workers": "workers", "report_to": "report_to", "torch_compile": "compile",
    "resume_from_checkpoint": "resume", "dataloader_drop_last": "", "remove_unused_columns": "",
    "disable_tqdm": "", "ddp_find_unused_parameters": "", "label_smoothing_factor": "",
    "load_best_model_at_end": "", "metric_for_best_model": "", "logging_nan_inf_filter": "",
    # what resuming, validation or the mean over a step's tokens rests on
    "save_only_model": "", "ignore_data_skip": "", "do_train": "", "do_eval": "", "do_predict": "",
    "eval_on_start": "", "average_tokens_across_devices": "", "neftune_noise_alpha": "",
    "gradient_checkpointing": "checkpoint_activations", "gradient_checkpointing_kwargs": "",
    # what has options or a launcher of its own
    "torch_compile_backend": "compile", "torch_compile_mode": "compile", "fsdp": "",
    "fsdp_config": "", "deepspeed": "", "use_liger_kernel": "", "push_to_hub": "",
}  # fmt: skip


def training_arguments(config: TrainConfig, device: torch.device) -> TrainingArguments:
    """transformers' arguments for a run; checkpoints go to `out/checkpoints`."""
    schedulers = {
        "constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine",
    }  # fmt: skip
    extra = {
        "optim": "adamw_torch_fused", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
        **extra_arguments(config),
    }  # fmt: skip
    try:
        arguments = _Arguments(
            output_dir=str(Path(config.out) / "checkpoints"),
            max_steps=config.steps,
            per_device_train_batch_size=micro_batch(config, PartialState().num_processes),
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.lr,
            lr_scheduler_type=schedulers[config.lr_schedule],
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=resolve_precision(config.precision, device) == "bf16",
            use_cpu=device.type == "cpu",
            seed=config.seed,
            data_seed=config.seed,
            logging_strategy="steps",
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=config.save_every,
            eval_strategy="steps" if config.eval_every else "no",
            eval_steps=config.eval_every or None,
            dataloader_drop_last=True,
            dataloader_num_workers=config.workers,
            remove_unused_columns=False,
            report_to=[name for name in reporters(config) if name != "tensorboard"],
            disable_tqdm=True,
            **parallel.ARGUMENTS,
            **extra,
        )
        kind, chosen = Trainer.get_optimizer_cls_and_kwargs(arguments)
        kind([torch.zeros(1, requires_grad=True)], **chosen)  # refuses what it cannot take
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        if not config.trainer_args:
            raise
        raise InputError(f"`trainer_args`: {' '.join(str(error).split())}") from error
    arguments.run = config
    if arguments.n_gpu > 1:
        # transformers would split batches by DataParallel; torchrun is the way to use them all.
        arguments._n_gpu = 1
    return arguments


class _Arguments(TrainingArguments):
    """transformers' arguments; whoever logs them (W&B, TensorBoard, …) logs the run's too."""

    run: TrainConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        own = {} if self.run is None else vars(self.run)
        return {**super().to_dict(), **{f"blockdiff.{name}": own[name] for name in own}}


def extra_arguments(config: TrainConfig) -> dict[str, Any]:
    """What `trainer_args` says, as `TrainingArguments` takes it.

    Raises `InputError` for a field there is not, one that an option of ours sets, or a value that
    the field's type does not take.
    """
    kind: Any = TrainingArguments
    parser = HfArgumentParser(kind, allow_abbrev=False)
    known = {field.name for field in fields(TrainingArguments) if field.init}

    def refuse(message: str) -> NoReturn:
        raise InputError(f"`trainer_args`: {message}")

    parser.error = refuse  # type: ignore[method-assign]
    found = {}
    for given in config.trainer_args or []:
        name, equals, value = given.partition("=")
        if not equals:
            refuse(f"{given!r} is not of the form name=value")
        if name in _OWNED:
            option = _OWNED[name]
            advice = f"give `{option}`" if option else "this package decides it"
            refuse(f"{name} cannot be set here; {advice}")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            refuse(f"transformers.TrainingArguments has no field {name!r}{hint}")
        found[name] = getattr(parser.parse_args([f"--{name}={value}"]), name)
    return found


def micro_batch(config: TrainConfig, processes: int) -> int:
    """Windows that go through the network at once in each of `processes`.

    Raises `InputError` when a step's windows cannot be shared out equally.
    """
    parts = processes * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"`batch_size` {config.batch_size} cannot be cut into equal parts for {processes} "
            f"processes of {config.accumulate} micro-batches; make it a multiple of {parts}"
        )
    return config.batch_size // parts


def reporters(config: TrainConfig) -> list[str]:
    """Where metrics go beside metrics.jsonl.

    Raises `InputError` for a name transformers does not know or whose package is missing.
    """
    names = [name.strip() for name in config.report_to.split(",")]
    names = [name for name in names if name not in ("", "none")]
    there = get_available_reporting_integrations()
    for name in names:
        one_of("report_to", name, INTEGRATION_TO_CALLBACK)
        if name not in there:
            if name == "wandb":
                need("wandb", extra="wandb", what="`report_to` wandb")
            raise InputError(
                f"`report_to` {name} needs a package that is not installed; leave it out, or "
                f"install {name} first"
            )
    return names
