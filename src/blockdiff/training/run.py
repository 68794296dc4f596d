"""A training run from its configuration to a finished model folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import set_seed
from transformers.utils import is_torch_bf16_gpu_available

from blockdiff import folders
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.estimators import make_estimator
from blockdiff.layout import BlockLayout
from blockdiff.models.adapted import Adapted
from blockdiff.models.card import write_card
from blockdiff.models.hub import WEIGHTS, load_model, save_model
from blockdiff.models.lora import require_peft
from blockdiff.models.weights import resolve_precision
from blockdiff.noising import stratified_noise
from blockdiff.registry import OBJECTIVES
from blockdiff.training.arguments import training_arguments
from blockdiff.training.building import build_model, take_weights
from blockdiff.training.callbacks import MetricsLog, ProgressBar
from blockdiff.training.checkpoints import (
    checkpoint_step,
    newest_checkpoint,
    remove_unfinished,
)
from blockdiff.training.config import BLOCK_SIZE, Precision, TrainConfig
from blockdiff.training.data import check_data, prepare_data
from blockdiff.training.parallel import gathered
from blockdiff.training.record import begin
from blockdiff.training.resume import announce_rate, last_validation, restore
from blockdiff.training.signals import stopped_by
from blockdiff.training.stored import load_config, load_record, merge_resumed, save_config
from blockdiff.training.trainer import BlockDiffusionTrainer


@dataclass(frozen=True)
class Trained:
    """A finished run: its folder, the validation of its averaged weights, and its cost.

    `steps`: how many this call made; 0 for a run that was finished already.
    `is_main_process`: whether this is the process that reports, of those that trained.
    """

    folder: Path
    metrics: dict[str, float]
    tokens_seen: int
    seconds: float
    is_main_process: bool = True
    steps: int = 0


def train(
    config: TrainConfig,
    *,
    progress: bool = True,
    device: str | None = None,
    trainer_class: Callable[..., BlockDiffusionTrainer] = BlockDiffusionTrainer,
    given: Collection[str] | None = None,
) -> Trained:
    """Runs or resumes the training `config` describes and leaves the model in `config.out`.

    The folder then holds the averaged weights, the tokenizer, the resolved configuration with
    the run's record (run.json), metrics.jsonl and the checkpoints. A run that is resumed and has
    nothing left to do is not touched. `given`: for a resumed run, which options were asked for
    (see `merge_resumed`). `device` goes before the configuration's.

    Raises `InputError` for bad input, before anything that was in the folder is touched.

    Example:
        >>> import blockdiff
        >>> from pathlib import Path
        >>> _ = Path("notes.txt").write_text("The law of the land is the law. " * 200)
        >>> config = blockdiff.TrainConfig(
        ...     data="notes.txt", out="run", vocab_size=270, length=16, steps=2, batch_size=2,
        ...     eval_windows=2, report_to="none"
        ... )
        >>> done = blockdiff.train(config, progress=False)
        >>> done.steps, (done.folder / "model.safetensors").is_file()
        (2, True)
    """
    if config.resume:
        load_config(folders.local_path("out", config.out))  # refused before a folder is made
    where = choose_device(config.device if device is None else device)
    # The others wait while one packs the corpus, which can take hours.
    processes = PartialState(cpu=where.type == "cpu", timeout=timedelta(days=1))
    with _claimed(config, processes) as out:
        if not config.resume:
            return _train(
                replace(config, out=str(out)), processes, where, progress, None, {}, trainer_class
            )
        record, stored = load_record(out), load_config(out)
        config = merge_resumed(config, given)
        if device is None and config.device != stored.device:
            where = choose_device(config.device)
        newest = newest_checkpoint(out)
        finished = record.get("finished") or {}
        done = max(checkpoint_step(newest) if newest else 0, finished.get("steps", 0))
        if config.steps < done:
            raise InputError(
                f"`steps` is {config.steps}, but the run in {out} has done {done}; give at least "
                "as many"
            )
        if finished.get("steps") == config.steps and (out / WEIGHTS).is_file():
            return _finished(config, finished, processes)
        if processes.is_main_process and config.steps != stored.steps:
            announce_rate(stored, config, done)
        return _train(config, processes, where, progress, stored, record, trainer_class)


@contextmanager
def _claimed(config: TrainConfig, processes: PartialState) -> Iterator[Path]:
    """The run's folder, locked by the main process for all."""
    with ExitStack() as held:
        refused: list[str | None] = [None]
        if processes.is_main_process:
            try:
                held.enter_context(
                    folders.claim(
                        config.out,
                        overwrite=config.overwrite,
                        go_on=config.resume,
                        can_resume=True,
                    )
                )
            except InputError as error:
                refused = [str(error)]
        broadcast_object_list(refused)
        if refused[0] is not None:
            raise InputError(refused[0])
        yield folders.local_path("out", config.out)


def _finished(config: TrainConfig, found: dict[str, Any], processes: PartialState) -> Trained:
    """The result of a run that is resumed with nothing left to do, as run.json keeps it."""
    metrics = {
        name: math.nan if value is None else value for name, value in found["metrics"].items()
    }
    seen = found["steps"] * config.batch_size * config.length
    return Trained(Path(config.out), metrics, seen, found["seconds"], processes.is_main_process)


def _train(
    config: TrainConfig,
    processes: PartialState,
    where: torch.device,
    progress: bool,
    stored: TrainConfig | None,
    record: dict[str, Any],
    trainer_class: Callable[..., BlockDiffusionTrainer],
) -> Trained:
    """A run in a folder that is claimed; `stored` and `record`: of a run that is resumed."""
    out = Path(config.out)
    config = _with_precision(config, where)
    _try_estimator(config)
    training_arguments(config, where)
    if config.lora is not None:
        require_peft()
    set_seed(config.seed)
    checkpoint = None
    if stored is not None:
        if processes.is_main_process:
            remove_unfinished(out)
        processes.wait_for_everyone()
        checkpoint = newest_checkpoint(out, say=processes.is_main_process)
    # The checkpoints of a run that trains a part go on top of where it began.
    partly = OBJECTIVES.find(config.objective).trains is not None
    begun = checkpoint if config.lora is None and not partly else None
    start, average, updates = _start(config.init_from, begun, averaged=partly)
    if partly and (start is None or start.config.causal):
        raise InputError(
            f"`objective` {config.objective} trains what drafts for a block diffusion model: name "
            "one as `init_from`"
        )
    if config.block_size is None:
        known = start.config.block_sizes if isinstance(start, Adapted) or partly else (BLOCK_SIZE,)
        known = known if not partly else [size for size in known if size > 1] or (BLOCK_SIZE,)
        config = replace(config, block_size=",".join(map(str, known)))
    with processes.main_process_first():  # the others find the corpus packed
        place = processes.process_index, processes.num_processes
        data = prepare_data(config, place, start.config.prompt_grid if start else "absolute")
    check_data(config, record, data.fingerprints)
    model = build_model(config, data.tokenizer, start)
    if processes.is_main_process:
        head_dim = model.new_cache(0, 0, 1).layers[0].key_width
        record = begin(config, data, where, record, head_dim)
    processes.wait_for_everyone()
    tokens_per_step = config.batch_size * config.length
    bar = ProgressBar(f"{model.config.kind} → {config.out}", tokens_per_step)
    log = MetricsLog(out, tokens_per_step)
    trainer = trainer_class(
        model, config, data.train, data.validation, where, [log, *([bar] if progress else [])]
    )
    if average is not None and trainer.ema is not None:
        take_weights(trainer.averaged_model, average)
        trainer.ema_updates = updates
    before = checkpoint_step(checkpoint) if checkpoint else 0
    seconds = 0.0
    try:
        if checkpoint is not None and before >= config.steps:
            restore(trainer, checkpoint, log)
        else:
            with trainer.signals:
                made = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if received := trainer.received_signal():
                raise stopped_by(received, config.out, made.global_step)
            seconds = float(made.metrics["train_runtime"])
        steps = trainer.state.global_step
        # Before it is measured: whatever comes of that, the model is there.
        _save(trainer, out)
        metrics = last_validation(trainer) or trainer.evaluate()
    finally:
        bar.stop()
    if config.searches_clip:  # the validation may have found another
        _save(trainer, out)
    if trainer.is_world_process_zero():
        result = {"steps": steps, "metrics": metrics, "seconds": round(seconds, 1)}
        save_config(config, out, record | {"finished": result})
        write_card(out, trainer.averaged_model.config)
    seen = steps * tokens_per_step
    return Trained(out, metrics, seen, seconds, processes.is_main_process, steps - before)


def _save(trainer: BlockDiffusionTrainer, out: Path) -> None:
    with gathered(trainer.averaged_model):
        if trainer.is_world_process_zero():
            model: Any = trainer.averaged_model
            save_model(model, out)
            if trainer.run.lora is not None:
                model.adapter.save(model, out / "adapter")


def _try_estimator(config: TrainConfig) -> None:
    """Draws masks once, so that an estimator that cannot is refused before the text is read."""
    for size in config.block_sizes if OBJECTIVES.find(config.objective).noised else ():
        layout = BlockLayout(config.length, size)
        noise = stratified_noise(1, layout, torch.Generator().manual_seed(0))
        clip = config.first_clip
        make = make_estimator(config.estimator, config.schedule, clip, config.timesteps)
        x_0 = torch.zeros(1, config.length, dtype=torch.int64)
        draw = make(x_0, layout, noise, torch.ones_like(x_0, dtype=torch.bool), 1)
        if not bool((draw.weight.isfinite() & (draw.weight >= 0)).all()):
            raise InputError(
                f"the estimator {config.estimator} with the schedule {config.schedule} gave "
                "weights that are negative or not finite"
            )


def _with_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The configuration with what "auto" stands for, by the main process's device.

    Raises `InputError` where the device cannot compute in it: a resumed run may have moved.
    """
    chosen = [resolve_precision(config.precision, device)]
    broadcast_object_list(chosen)
    if chosen[0] == "bf16" and device.type != "cpu" and not is_torch_bf16_gpu_available():
        whose = f"the run in {config.out} computes in bf16" if config.resume else "`precision` bf16"
        raise InputError(f"{whose}, which this machine's {device.type} cannot do; use another one")
    return replace(config, precision=cast(Precision, chosen[0]))


def _start(
    source: str | None, checkpoint: Path | None, averaged: bool = False
) -> tuple[Any, Any, int]:
    """(weights, their moving average, how many updates made it) to start from.

    A run of ours keeps both, the weights in its last checkpoint; another folder has one set only,
    which then stands for both; so does the average where only that is wanted. A run that has a
    `checkpoint` of its own goes on from that alone.
    """
    if source is None:
        return None, None, 0
    if checkpoint is not None:
        return load_model(checkpoint), None, 0
    average, newest = load_model(source), None if averaged else newest_checkpoint(Path(source))
    if newest is None or not (newest / "config.json").is_file():  # it holds a part only
        return average, None, 0
    return load_model(newest), average, checkpoint_step(newest)
