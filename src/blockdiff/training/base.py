"""transformers' Trainer as a run needs it, whatever the loss: it can be stopped at any time.

A run that is interrupted, or that diverges, leaves whole checkpoints behind. Each holds, beside
what transformers saves, the moving average of the weights and the clip of the mask rates.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from blockdiff.errors import InputError, RunStopped
from blockdiff.registry import OBJECTIVES
from blockdiff.training import parallel
from blockdiff.training.arguments import training_arguments
from blockdiff.training.blocks import LossByPart
from blockdiff.training.callbacks import Bookkeeping, tensorboard
from blockdiff.training.checkpoints import newest_checkpoint, prune, seal
from blockdiff.training.config import TrainConfig
from blockdiff.training.ema import Average
from blockdiff.training.signals import Signals

NEVER = 2**62  # a step no run comes to
EMA_WEIGHTS = "ema.safetensors"
CLIP = "clip.json"


class RunTrainer(Trainer):
    """What a run needs of transformers' Trainer; `BlockDiffusionTrainer` adds the loss."""

    clip: tuple[float, float] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        train_dataset: Dataset,
        device: torch.device,
        callbacks: list[TrainerCallback],
        *,
        validates: bool,
    ) -> None:
        self.run = config
        self.signals = Signals()
        self.ema = Average(model, config.ema) if config.ema else None
        self.ema_updates = 0  # of the average that another run left, where this one goes on from it
        self._first_bad_step = torch.tensor(NEVER)
        self._losses = LossByPart()
        super().__init__(
            model=model,
            args=training_arguments(config, device),
            train_dataset=train_dataset,
            # Trainer only asks whether there is one; `evaluate` is the subclass's.
            eval_dataset=train_dataset if validates else None,
            callbacks=[Bookkeeping(self), *tensorboard(config), *callbacks],
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
        """Takes the clip of a checkpoint."""
        self.clip = clip

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

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers' formula is for one stream of tokens."""
        return 0

    def received_signal(self) -> int:
        """The signal that some process received; 0 for none. All processes ask together."""
        own = torch.tensor(self.signals.received, device=self.args.device)
        return int(self.accelerator.gather(own).max())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also the loss of each block size, where the run has several."""
        if "loss" in logs:
            found = self._losses.take(self.accelerator.gather)
            several = len(self.run.block_sizes) > 1 or len(found) > 1
            logs |= found if several else {}
        super().log(logs, start_time)

    @property
    def averaged_model(self) -> PreTrainedModel:
        """The moving average of the weights, or without one the weights themselves.

        That of a sharded run is sharded too: `parallel.gathered` has it whole.
        """
        own = self.accelerator.unwrap_model(self.model)
        return cast(PreTrainedModel, own if self.ema is None else self.ema.module)

    # A run that diverges. A step's loss is not looked at in the step: that would wait for the GPU.

    def note_losses(self, losses: dict[str, Tensor], block_size: int) -> None:
        """Remembers the first step whose loss was not finite, and the losses of each block size.

        `losses`: the parts of a step's loss, by name; the first is that of the blocks.
        """
        step, (first, *others) = self.state.global_step, losses
        self._losses.add(str(block_size), step, losses[first])
        for name in others:
            self._losses.add(name, step, losses[name])
        finite = torch.stack([*losses.values()]).detach().isfinite().all()
        before = self._first_bad_step.to(finite.device)
        self._first_bad_step = torch.where(finite, before, before.clamp(max=step + 1))

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

    # checkpoints

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
                    save_file(self.ema.trained, folder / EMA_WEIGHTS, metadata=updates)
        self.accelerator.wait_for_everyone()  # the folder is there for all
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # and holds every process's part
        if self.args.should_save:
            seal(folder)
            run = self.run  # the older go only now: whatever happens, a whole one is there
            prune(folder, run.keep_last, run.keep_every, run.save_every)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if OBJECTIVES.has(self.run.objective, "trains"):  # the model to start from has the rest
            network = self.accelerator.unwrap_model(self.model)
            trained = {k: p.detach() for k, p in network.named_parameters() if p.requires_grad}
            save_file(trained, Path(str(output_dir)) / SAFE_WEIGHTS_NAME)
            return
        if self.run.lora is not None and state_dict is None:
            # Without one an adapted model would write its pairs added in, and not themselves.
            state_dict = self.accelerator.unwrap_model(self.model).state_dict()
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        stored = Path(resume_from_checkpoint) / CLIP
        if self.run.searches_clip and stored.is_file():
            beta, omega = json.loads(stored.read_text(encoding="utf-8"))
            self.use_clip((beta, omega))
        if self.ema is not None:
            average = Path(resume_from_checkpoint) / EMA_WEIGHTS
            self.ema.module.load_state_dict(load_file(average), strict=False)
            with safe_open(average, "pt") as file:
                self.ema_updates = int((file.metadata() or {}).get("updates_before", 0))
