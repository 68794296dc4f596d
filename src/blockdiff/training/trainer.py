"""Training: `transformers.Trainer` with block diffusion's loss, an EMA and safe checkpoints.

    x_0 → Draw(x_t, sigma, weight) → logits at the masked positions → nats [B, L] → scalar

Resuming, accumulation, precision, clipping and several processes come from transformers and
accelerate. A step's masks are drawn for its whole batch, from (seed, step), and each micro-batch of
each process takes its rows of them. So a resumed run sees the very numbers it would have seen
uninterrupted, and the gradient of a step does not depend on how many processes share it.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import (
    TensorBoardCallback,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from blockdiff.categorical import fold_seed
from blockdiff.errors import InputError, RunStopped
from blockdiff.estimators import make_estimator
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.layout import BlockLayout
from blockdiff.models.denoiser import Denoiser
from blockdiff.noising import Draw, stratified_noise
from blockdiff.objectives import objective_of
from blockdiff.training import parallel
from blockdiff.training.arguments import reporters, training_arguments
from blockdiff.training.checkpoints import checkpoint_step, checkpoints, newest_checkpoint, seal
from blockdiff.training.clipping import WHOLE, best_clip, clip_variances
from blockdiff.training.config import TrainConfig
from blockdiff.training.ema import Average
from blockdiff.training.signals import Signals

NEVER = 2**62  # a step no run comes to
EMA_WEIGHTS = "ema.safetensors"
CLIP = "clip.json"
# Validation windows a search for a clip looks at.
CLIP_WINDOWS = 128


class BlockDiffusionTrainer(Trainer):
    """Trains a network, a `Denoiser`, by the objective its own configuration names."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        train_dataset: Dataset,
        eval_windows: dict[str, Tensor] | None,
        device: torch.device,
        callbacks: list[TrainerCallback],
    ) -> None:
        """`eval_windows`: x_0 [B, L] and, where windows are padded, documents [B, L]."""
        self.run = config
        self.signals = Signals()
        self.eval_windows = eval_windows
        self.use_clip(config.clip_range() or (WHOLE if config.searches_clip else None))
        self.ema = Average(model, config.ema) if config.ema else None
        self.ema_updates = 0  # of the average that was carried over from another run
        self._micro = (-1, 0)
        self._first_bad_step = torch.tensor(NEVER)
        super().__init__(
            model=model,
            args=training_arguments(config, device),
            train_dataset=train_dataset,
            # Trainer only asks whether there is one; `evaluate` reads `eval_windows`.
            eval_dataset=train_dataset if eval_windows is not None else None,
            callbacks=[_Bookkeeping(self), *_tensorboard(config), *callbacks],
        )
        if self.ema is not None:
            self.ema.module.to(self.args.device)
        parallel.allow_tf32(self.args.bf16, self.args.device)
        if self.is_fsdp_enabled:
            if self.ema is None:
                raise InputError("a sharded run is measured and saved by its `ema`; give one")
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = parallel.mixed_precision(self.args.bf16)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The loss is already divided by the tokens of the whole step.
        self.model_accepts_loss_kwargs = True

    def use_clip(self, clip: tuple[float, float] | None) -> None:
        """Draws masks within `clip` from now on."""
        run = self.run
        self.clip = clip
        self.estimator = make_estimator(run.estimator, run.schedule, clip, run.timesteps)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        # Each process already reads documents of its own; accelerate would deal them out again.
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            drop_last=True,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    # the loss of a batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        x_0, documents = inputs["x_0"], inputs.get("documents")
        first = self._begin_micro_batch(len(x_0))
        core: Denoiser = self.accelerator.unwrap_model(model)
        objective = objective_of(core.config)
        layout = BlockLayout(x_0.shape[1], core.config.block_size, documents=documents)
        maskable = objective.counted(x_0, core.config.keep_first, documents)
        what: Tensor | Draw = maskable
        if objective.noised:
            seed = fold_seed(self.run.seed, self.state.global_step)
            generator = torch.Generator(x_0.device).manual_seed(seed)
            noise = stratified_noise(self.run.batch_size, layout, generator)
            noise = noise.rows(first, first + len(x_0))
            what = self.estimator(x_0, layout, noise, maskable, core.config.mask_token_id)
        nats = objective.nats(model, x_0, what, layout)
        # Gradients are averaged over processes, so each counts its share of the step's tokens.
        tokens = torch.as_tensor(num_items_in_batch, device=nats.device, dtype=torch.float32)
        loss = nats.sum() * self.accelerator.num_processes / tokens.clamp(min=1)
        self._first_bad_step = torch.where(
            loss.detach().isfinite(),
            self._first_bad_step.to(loss.device),
            self._first_bad_step.to(loss.device).clamp(max=self.state.global_step + 1),
        )
        return (loss, {"nats": nats}) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor:
        """Tokens of a whole step that count: padding makes micro-batches unequal."""
        config = self.accelerator.unwrap_model(self.model).config
        counted = objective_of(config).counted
        counts = [
            counted(batch["x_0"], config.keep_first, batch.get("documents")).sum()
            for batch in batch_samples
        ]
        tokens = torch.stack(counts).sum().float().to(device)
        return cast(Tensor, self.accelerator.reduce(tokens, reduction="sum"))

    def received_signal(self) -> int:
        """The signal that some process received; 0 for none. All processes ask together."""
        own = torch.tensor(self.signals.received, device=self.args.device)
        return int(self.accelerator.gather(own).max())

    # a run that diverged

    def require_finite_loss(self) -> None:
        """Raises `RunStopped` when a step's loss, in any process, was not finite."""
        step = int(self.accelerator.gather(self._first_bad_step.to(self.args.device)).min())
        if step <= self.state.global_step:
            self._diverged(f"the loss is not finite at step {step}")

    def _require_finite(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.is_floating_point() and not bool(local.isfinite().all()):
                self._diverged(f"{name} is not finite after step {self.state.global_step}")

    def _diverged(self, what: str) -> NoReturn:
        newest = newest_checkpoint(Path(self.run.out))
        kept = "no checkpoint was written before" if newest is None else f"{newest} is kept"
        raise RunStopped(
            f"{what}: training stops, {kept}; begin again with a lower `lr`, more `warmup` steps "
            "or a smaller `max_grad_norm`",
            exit_code=1,
        )

    def _begin_micro_batch(self, rows: int) -> int:
        """Which row of the step's batch this micro-batch begins at; seeds dropout by it.

        accelerate deals the micro-batches of a step out to the processes in turn.
        """
        step, micro = self._micro
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro = (self.state.global_step, micro)
        accelerator = self.accelerator
        first = (micro * accelerator.num_processes + accelerator.process_index) * rows
        torch.manual_seed(fold_seed(self.run.seed, self.state.global_step, first))
        return first

    # validation and saving use the moving average of the weights

    @property
    def averaged_model(self) -> PreTrainedModel:
        """The EMA of the weights, or the weights themselves without one.

        Of a sharded run it is sharded: `parallel.gathered` has it whole.
        """
        own = self.accelerator.unwrap_model(self.model)
        return cast(PreTrainedModel, own if self.ema is None else self.ema.module)

    def evaluate(self, *unused: object, **options: object) -> dict[str, float]:
        """The likelihood of the validation windows, in the run's precision."""
        device = self.args.device.type
        with (
            parallel.gathered(self.averaged_model),
            torch.autocast(device, torch.bfloat16, enabled=self.args.bf16),
        ):
            return self._measure(cast(Denoiser, self.averaged_model))

    def _measure(self, model: Denoiser) -> dict[str, float]:
        assert self.eval_windows is not None
        windows = {name: x.to(self.args.device) for name, x in self.eval_windows.items()}
        result = likelihood(
            model,
            windows["x_0"],
            draws=self.run.eval_draws,
            seed=self.run.seed,
            documents=windows.get("documents"),
            processes=self.accelerator.state,
        )
        metrics = {
            "eval_nats_per_token": result.nats_per_token,
            "eval_stderr": result.stderr,
            "eval_perplexity": result.perplexity,
        }
        if self.run.searches_clip:
            metrics |= self._search_clip(model, windows)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _search_clip(self, model: Denoiser, windows: dict[str, Tensor]) -> dict[str, float]:
        """Takes the clip of least variance on the first windows, at most `CLIP_WINDOWS`."""
        documents = windows.get("documents")
        found = clip_variances(
            model,
            windows["x_0"][:CLIP_WINDOWS],
            fold_seed(self.run.seed, self.state.global_step),
            None if documents is None else documents[:CLIP_WINDOWS],
            self.run.estimator,
        )
        best = best_clip(found)
        self.use_clip((best.beta, best.omega))
        model.config.clip = [best.beta, best.omega]
        return {
            "clip_beta": best.beta, "clip_omega": best.omega, "clip_variance": best.variance
        }  # fmt: skip

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.require_finite_loss()
        self._require_finite(self.accelerator.unwrap_model(self.model))
        folder = Path(self.run.out) / "checkpoints" / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # a half-written one of the same step
            folder.mkdir(parents=True)
            (folder / CLIP).write_text(json.dumps(self.clip), encoding="utf-8")
        if self.ema is not None:
            with parallel.gathered(self.ema.module):
                self._require_finite(self.ema.module)
                if self.args.should_save:
                    updates = {"updates_before": str(self.ema_updates)}
                    save_file(self.ema.module.state_dict(), folder / EMA_WEIGHTS, metadata=updates)
        self.accelerator.wait_for_everyone()  # the folder is there for all
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # and holds every process's part
        if self.args.should_save:
            seal(folder)
            # Only now, so that the newest whole one is there whatever happens.
            older = [found for found in checkpoints(Path(self.run.out)) if found != folder]
            for old in older[self.run.keep_last - 1 :]:
                if not self._stays(checkpoint_step(old)):
                    shutil.rmtree(old)

    def _stays(self, step: int) -> bool:
        """Whether this is the first checkpoint at or after a multiple of `keep_every`."""
        every = self.run.keep_every
        return 0 < every <= step and step % every < self.run.save_every

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        stored = Path(resume_from_checkpoint) / CLIP
        if self.run.searches_clip and stored.is_file():
            beta, omega = json.loads(stored.read_text(encoding="utf-8"))
            self.use_clip((beta, omega))
        if self.ema is not None:
            average = Path(resume_from_checkpoint) / EMA_WEIGHTS
            self.ema.module.load_state_dict(load_file(average))
            with safe_open(average, "pt") as file:
                self.ema_updates = int((file.metadata() or {}).get("updates_before", 0))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers' formula is for one stream of tokens."""
        return 0


class _TensorBoard(TensorBoardCallback):
    """Stays open after the last step: the last validation belongs to the same folder."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        if self.tb_writer is not None:
            self.tb_writer.flush()


def _tensorboard(config: TrainConfig) -> list[TrainerCallback]:
    """Event files in the run's own folder; transformers would put them among the checkpoints."""
    if "tensorboard" not in reporters(config):
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [_TensorBoard(SummaryWriter(str(Path(config.out) / "tensorboard")))]


class _Bookkeeping(TrainerCallback):
    """The EMA's update, a log line before each checkpoint, and the end by the clock."""

    def __init__(self, trainer: BlockDiffusionTrainer) -> None:
        self.trainer = trainer

    def _network(self) -> nn.Module:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.n_averaged.fill_(self.trainer.ema_updates + state.global_step)
            parallel.shard_like(self.trainer.ema.module, self._network())
        self.begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update_parameters(self._network())
        minutes = self.trainer.run.minutes
        if minutes and time.perf_counter() - self.begin > 60 * minutes:
            control.should_training_stop = control.should_save = True
        # Elsewhere asking the device waits for it: there these are looked at with the log.
        if args.device.type == "cpu" or control.should_log or control.should_save:
            self.trainer.require_finite_loss()
            if self.trainer.received_signal():
                control.should_training_stop = control.should_save = True
        if control.should_save:
            # A log line averages since the one before; ending it here makes a resumed run's
            # lines equal to an uninterrupted one's.
            control.should_log = True
