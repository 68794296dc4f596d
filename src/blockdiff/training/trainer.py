"""Training: `transformers.Trainer` with the loss of block diffusion.

    x_0 → Draw(x_t, sigma, weight) → logits at the masked positions → nats [B, L] → scalar

Accumulation, precision, gradient clipping, many processes and the optimizer come from transformers
and accelerate; stopping, resuming and checkpoints from `RunTrainer` (base.py). After each optimizer
step the moving average of the weights (ema.py) is updated: it is what is measured and saved.

The masks of a step are drawn from (seed, step) for the whole batch, and each micro-batch of each
process takes its rows of them. With 2 processes, 2 micro-batches each and 8 sequences a step,
sequences 0–1 are the first micro-batch of process 0, 2–3 that of process 1, 4–5 and 6–7 the second
ones. So a resumed run has the masks of an uninterrupted one, and the gradient of a step does not
depend on how many processes share it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback

from blockdiff.categorical import fold_seed
from blockdiff.estimators import make_estimator
from blockdiff.evaluation.likelihood import likelihood
from blockdiff.models.denoiser import Conventions, Denoiser
from blockdiff.noising import Draw, stratified_noise
from blockdiff.registry import OBJECTIVES
from blockdiff.training import parallel
from blockdiff.training.base import RunTrainer
from blockdiff.training.blocks import block_size_of
from blockdiff.training.clipping import search_clip
from blockdiff.training.config import TrainConfig
from blockdiff.training.parts import parts_of


class BlockDiffusionTrainer(RunTrainer):
    """Trains a network, a `Denoiser`, by the run's objective."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        train_dataset: Dataset,
        eval_windows: dict[str, Tensor] | None,
        device: torch.device,
        callbacks: list[TrainerCallback],
    ) -> None:
        """`eval_windows`: x_0 [B, L]; documents and maskable [B, L] as the windows have them."""
        self.eval_windows, self.trained_by = eval_windows, OBJECTIVES.find(config.objective)
        validates = eval_windows is not None
        super().__init__(model, config, train_dataset, device, callbacks, validates=validates)
        self.use_clip(config.first_clip)
        self._micro = (-1, 0)  # the step of the last micro-batch, and its number in that step

    def use_clip(self, clip: tuple[float, float] | None) -> None:
        """Draws masks within `clip` from now on."""
        run, self.clip = self.run, clip
        if self.trained_by.masks == "all":
            self.estimator = make_estimator("clipped", clip=(1.0, 1.0))
        else:
            self.estimator = make_estimator(run.estimator, run.schedule, clip, run.timesteps)

    @property
    def conventions(self) -> Conventions:
        """The network's configuration."""
        return cast(Denoiser, self.accelerator.unwrap_model(self.model)).config

    def counted(self, x_0: Tensor, documents: Tensor | None) -> Tensor:
        """bool [B, L]: the tokens the loss is a mean over, by the objective; never padding."""
        return self.trained_by.counted(x_0, self.conventions.keep_first, documents)

    def maskable(self, windows: dict[str, Tensor]) -> Tensor:
        """What is `counted` of windows; of conversations only what they name `maskable`."""
        counted = self.counted(windows["x_0"], windows.get("documents"))
        return counted & windows.get("maskable", counted)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch: its part of the step's mean nats per token."""
        x_0 = inputs["x_0"]
        first = self._begin_micro_batch(len(x_0))
        config, objective = self.conventions, self.trained_by
        size = block_size_of(self.run, self.state.global_step)
        layout = config.layout_of(x_0.shape[1], size, documents=inputs.get("documents"))
        maskable = self.maskable(inputs)
        what: Tensor | Draw = maskable
        if objective.noised:
            seed = fold_seed(self.run.seed, self.state.global_step)
            generator = torch.Generator(x_0.device).manual_seed(seed)
            noise = stratified_noise(self.run.batch_size, layout, generator)
            noise = noise.rows(first, first + len(x_0))
            what = self.estimator(x_0, layout, noise, maskable, config.mask_token_id)
        found = objective.nats(model, x_0, what, layout)
        parts = found if isinstance(found, dict) else {"": found}
        # The processes' gradients are averaged, not summed: hence the factor.
        tokens = torch.as_tensor(num_items_in_batch, device=x_0.device, dtype=torch.float32)
        share = self.accelerator.num_processes / tokens.clamp(min=1)
        losses = {name: nats.sum() * share for name, nats in parts.items()}
        self.note_losses(losses, size)
        weights = objective.parts if "ar" not in losses else {"ar": self.run.ar_weight}
        loss = torch.stack([weights.get(name, 1.0) * losses[name] for name in losses]).sum()
        return (loss, {"nats": next(iter(parts.values()))}) if return_outputs else loss

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, Tensor]], device: torch.device
    ) -> Tensor:
        """Tokens that count in the whole step; padding makes its micro-batches unequal."""
        counts = [self.maskable(own).sum() for own in batch_samples]
        tokens = torch.stack(counts).sum().float().to(device)
        return cast(Tensor, self.accelerator.reduce(tokens, reduction="sum"))

    def _begin_micro_batch(self, sequences: int) -> int:
        """Which sequence of the step is this micro-batch's first; its dropout is seeded by that.

        accelerate deals the micro-batches of a step out to the processes in turn.
        """
        step, micro = self._micro
        micro = micro + 1 if step == self.state.global_step else 0
        self._micro = (self.state.global_step, micro)
        accelerator = self.accelerator
        first = (micro * accelerator.num_processes + accelerator.process_index) * sequences
        torch.manual_seed(fold_seed(self.run.seed, self.state.global_step, first))
        return first

    def evaluate(self, *unused: object, **options: object) -> dict[str, float]:
        """The likelihood of the validation windows under the averaged weights.

        In the run's precision. A run that searches its clip does so here, by the same weights.
        """
        assert self.eval_windows is not None
        device, run = self.args.device, self.run
        windows = {name: x.to(device) for name, x in self.eval_windows.items()}
        x_0, documents, maskable = map(windows.get, ("x_0", "documents", "maskable"))
        assert x_0 is not None
        model = cast(Denoiser, self.averaged_model)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=self.args.bf16)
        with parallel.gathered(self.averaged_model), autocast:
            found = likelihood(
                model, x_0, draws=run.eval_draws, seed=run.seed, documents=documents,
                maskable=maskable, processes=self.accelerator.state,
            )  # fmt: skip
            metrics = {
                "eval_nats_per_token": found.nats_per_token,
                "eval_stderr": found.stderr,
                "eval_perplexity": found.perplexity,
            }
            metrics |= parts_of(self, model, windows)
            if run.searches_clip:
                seed = fold_seed(run.seed, self.state.global_step)
                best = search_clip(model, x_0, seed, documents, run.estimator, maskable)
                self.use_clip((best.beta, best.omega))
                model.config.clip = [best.beta, best.omega]
                metrics |= {f"clip_{name}": value for name, value in vars(best).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics
