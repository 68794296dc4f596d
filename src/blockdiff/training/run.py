"""A training run from its configuration to a finished model folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from blockdiff.data.corpora import Corpus, load_corpus, split_documents
from blockdiff.data.detokenizers import detokenized
from blockdiff.data.packing import StreamedWindows, Windows, pack, stream_windows
from blockdiff.data.tokenizers import bos_id, eos_id, load_tokenizer, train_tokenizer
from blockdiff.data.windows import stack
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.models.config import PRESETS, DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.models.hub import load_model, save_model
from blockdiff.training.callbacks import MetricsLog, ProgressBar
from blockdiff.training.config import CONFIG_FILE, TrainConfig, merge_resumed, save_config
from blockdiff.training.trainer import (
    BlockDiffusionTrainer,
    checkpoint_step,
    last_checkpoint,
    micro_batch,
    newest_checkpoint,
    reporters,
)


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder, the validation of its averaged weights, and its cost.

    `is_main_process`: whether this is the process that reports, of those that trained.
    """

    folder: Path
    metrics: dict[str, float]
    tokens_seen: int
    seconds: float
    is_main_process: bool = True


@dataclass(frozen=True)
class TrainingData:
    """`train`: windows to train on; `validation`: x_0 [B, L] (and documents [B, L])."""

    tokenizer: PreTrainedTokenizerBase
    train: Windows | StreamedWindows
    validation: dict[str, Tensor]


def train(
    config: TrainConfig,
    *,
    progress: bool = True,
    device: str | None = None,
    trainer_class: Callable[..., BlockDiffusionTrainer] = BlockDiffusionTrainer,
) -> Trained:
    """Runs or resumes the training `config` describes and leaves the model in `config.out`.

    The folder then holds the averaged weights, the tokenizer, the resolved configuration
    (run.json), metrics.jsonl and the checkpoints. Raises `InputError` for bad input, before
    anything that was in the folder is touched.
    """
    out = Path(config.out)
    if config.resume:
        config = merge_resumed(config)
    else:
        _check_free(out, config.overwrite)
    reporters(config)
    where = torch.device(device) if device else choose_device()
    # The others wait while one packs the corpus, which can take hours.
    processes = PartialState(cpu=where.type == "cpu", timeout=timedelta(days=1))
    micro_batch(config, processes.num_processes)  # refused before anything is touched
    set_seed(config.seed)
    if processes.is_main_process and config.resume:
        last_checkpoint(out)  # removes half-written ones
    processes.wait_for_everyone()
    checkpoint = newest_checkpoint(out) if config.resume else None
    start, average, updates = _start(config.init_from, checkpoint)
    with processes.main_process_first():  # the others find the corpus packed
        data = prepare_data(config, (processes.process_index, processes.num_processes))
    model = build_model(config, data.tokenizer, start)
    if processes.is_main_process and not config.resume:
        _begin(out, config, data.tokenizer)
    processes.wait_for_everyone()
    tokens_per_step = config.batch_size * config.length
    bar = ProgressBar(f"{model.config.kind} → {config.out}", tokens_per_step)
    trainer = trainer_class(
        model,
        config,
        data.train,
        data.validation,
        where,
        [MetricsLog(out, tokens_per_step), *([bar] if progress else [])],
    )
    if average is not None and trainer.ema is not None:
        _take_weights(trainer.averaged_model, average)
        trainer.ema_updates = updates
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        metrics = trainer.evaluate()
    finally:
        bar.stop()
    if trainer.is_world_process_zero():
        save_model(trainer.averaged_model, out)
        save_config(config, out)
    seen = result.global_step * tokens_per_step
    seconds = float(result.metrics["train_runtime"])
    return Trained(out, metrics, seen, seconds, processes.is_main_process)


def _start(source: str | None, checkpoint: Path | None) -> tuple[DiT | None, DiT | None, int]:
    """(weights, their moving average, how many updates made it) to start from.

    A run of ours keeps both, the weights in its last checkpoint; another folder has one set only,
    which then stands for both. A run that has a `checkpoint` of its own goes on from that alone.
    """
    if source is None:
        return None, None, 0
    if checkpoint is not None:
        return load_model(checkpoint), None, 0
    average, newest = load_model(source), newest_checkpoint(Path(source))
    if newest is None:
        return average, None, 0
    return load_model(newest), average, checkpoint_step(newest)


def _check_free(out: Path, overwrite: bool) -> None:
    """Raises `InputError` unless a new run may use the folder."""
    if out.is_file():
        raise InputError(f"{out} is a file; choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / CONFIG_FILE).is_file():
        raise InputError(f"{out} is not empty and holds no run of ours; choose another --out")
    if not overwrite:
        raise InputError(
            f"{out} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or choose another --out"
        )


def _begin(out: Path, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The run's folder with tokenizer and configuration; it replaces an earlier one in one go."""
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tokenizer.save_pretrained(fresh)
        save_config(config, fresh)
        fresh.chmod(0o755)  # mkdtemp's is private
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def prepare_data(config: TrainConfig, process: tuple[int, int] = (0, 1)) -> TrainingData:
    """Corpus, split, tokenizer and windows of a run.

    `process` (number, count): whose share of a stream it is.
    """
    corpus = _open(config, config.data, config.split, process if config.streaming else None)
    documents: Iterable[str] = corpus
    if config.validation_data is not None or config.validation_split is not None:
        split = config.validation_split or "train"
        held_out = list(_open(config, config.validation_data or config.data, split))
    elif config.streaming:
        raise InputError("a streamed corpus needs --validation_data or --validation_split")
    else:
        documents, held_out = split_documents(corpus, config.validation_fraction, config.seed)
    if config.streaming and not (config.tokenizer or config.init_from):
        raise InputError("a streamed corpus needs --tokenizer")
    tokenizer = _tokenizer(config, documents)
    options: dict[str, Any] = {"length": config.length, "bos": config.bos}
    windows: Windows | StreamedWindows
    if config.streaming:
        windows = stream_windows(documents, tokenizer, endless=True, **options)
    else:
        windows = pack(documents, tokenizer, across_documents=config.across_documents, **options)
        if len(windows) < config.batch_size:
            raise InputError(
                f"{config.data} fills {len(windows)} windows of {config.length} tokens, less than "
                f"a batch of {config.batch_size}: give more text, or lower --batch_size or --length"
            )
    validation = pack(held_out, tokenizer, across_documents=config.across_documents, **options)
    return TrainingData(tokenizer, windows, stack(validation, config.eval_windows))


def _open(
    config: TrainConfig, data: str, split: str, process: tuple[int, int] | None = None
) -> Corpus:
    """A corpus of the run; as a stream, where `process` says whose share of it."""
    corpus = load_corpus(
        data,
        split=split,
        text_column=config.text_column,
        streaming=process is not None,
        subset=config.subset if data == config.data else None,
        process=process or (0, 1),
    )
    return detokenized(corpus, config.detokenizer)


def _tokenizer(config: TrainConfig, documents: Iterable[str]) -> PreTrainedTokenizerBase:
    if config.resume:
        return load_tokenizer(config.out)
    if config.tokenizer or config.init_from:
        return load_tokenizer(str(config.tokenizer or config.init_from))
    return train_tokenizer(documents, config.vocab_size)


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, start: DiT | None) -> DiT:
    """A new network, or one that continues from `start` under another objective or block size.

    From an AR model a block diffusion model takes every weight; its adaLN, which AR does not have,
    starts with open gates and no shift or scale, so at first it computes exactly what AR did.
    """
    causal = config.objective == "ar"
    sizes: dict[str, Any] = dict(PRESETS[config.preset])
    adaln = config.adaln
    if start is not None:
        sizes = {name: getattr(start.config, name) for name in sizes}
        if start.config.vocab_size < len(tokenizer):
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens but {config.init_from} was trained "
                f"with {start.config.vocab_size}; use its own tokenizer"
            )
        adaln = adaln or start.config.adaln
    model = DiT(
        DiTConfig(
            vocab_size=start.config.vocab_size if start is not None else len(tokenizer),
            length=config.length,
            block_size=config.effective_block_size,
            causal=causal,
            adaln=adaln,
            time_conditioning=config.time_conditioning or config.objective == "sedd",
            score=config.objective == "sedd",
            dropout=config.dropout,
            keep_first=True,
            mask_token_id=tokenizer.mask_token_id,
            bos_token_id=bos_id(tokenizer),
            eos_token_id=eos_id(tokenizer),
            initial_shift=config.initial_shift,
            initial_gate=0.0 if start is None else 1.0,
            clip=config.clip_range(),
            **sizes,
        )
    )
    model.attention_backend = config.backend
    if start is not None:
        _take_weights(model, start)
    if config.compile:
        model.compile_layers()
    return model


def _take_weights(model: DiT, start: DiT) -> None:
    """Copies every weight both networks have; only adaLN may be on one side alone."""
    own, given = model.state_dict(), start.state_dict()
    for name, tensor in own.items():
        if name in given:
            tensor.copy_(given[name])
        elif "modulation" not in name and not name.startswith("sigma."):
            raise InputError(f"the model to start from has no {name}")
