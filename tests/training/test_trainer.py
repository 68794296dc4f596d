"""What a step is made of: every option reaches the optimizer, every micro-batch has its own."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from blockdiff.training.config import TrainConfig
from blockdiff.training.ema import Average
from blockdiff.training.run import train
from blockdiff.training.trainer import BlockDiffusionTrainer
from helpers import Operators

STEPS, WARMUP = 6, 2
RUNS: dict[str, dict[str, Any]] = {
    "all": {
        "lr_schedule": "cosine", "weight_decay": 0.3, "max_grad_norm": 0.01, "precision": "bf16",
        "accumulate": 4, "dropout": 0.1,
    },
    "none": {"lr_schedule": "linear", "weight_decay": 0.0, "max_grad_norm": 0.0},
    "default": {},
}  # fmt: skip


@dataclass
class Seen:
    """Of each step: the optimizer's groups, the norm of the gradient it was given."""

    config: TrainConfig
    groups: list[list[dict[str, Any]]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    # Of each micro-batch:
    seeds: list[int] = field(default_factory=list)
    autocast: list[bool] = field(default_factory=list)
    noise: list[torch.Tensor] = field(default_factory=list)
    decayed: set[str] = field(default_factory=set)


class Watched(BlockDiffusionTrainer):
    def __init__(self, *given: Any, seen: Seen, **named: Any) -> None:
        super().__init__(*given, **named)
        self.seen = seen
        draw = self.estimator

        def watched(x_0: Any, layout: Any, noise: Any, *rest: Any) -> Any:
            made = draw(x_0, layout, noise, *rest)
            seen.noise.append(made.x_t == rest[1])
            seen.seeds.append(torch.initial_seed())
            return made

        self.estimator = watched
        self.model.embedding.register_forward_hook(
            lambda *_: seen.autocast.append(torch.is_autocast_enabled("cpu"))
        )

    def create_optimizer(self, *given: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*given)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}

        def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            groups = optimizer.param_groups
            self.seen.groups.append([{k: v for k, v in g.items() if k != "params"} for g in groups])
            grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
            self.seen.norms.append(float(nn.utils.get_total_norm(grads)))
            for group in groups:
                if group["weight_decay"]:
                    self.seen.decayed |= {names[id(p)] for p in group["params"]}

        optimizer.register_step_pre_hook(look)
        return optimizer


def watch(folder: Path, **changes: Any) -> Seen:
    text = folder / "text.txt"
    text.write_text("the law of the land is the law, and the people keep it. " * 100)
    config = TrainConfig(
        out=str(folder / "run"), data=str(text), vocab_size=280, length=16, block_size=4,
        steps=STEPS, batch_size=8, warmup=WARMUP, lr=1e-2, ema=0.0, precision="float32",
        eval_windows=2, eval_draws=1, save_every=100, report_to="none", device="cpu",
    )  # fmt: skip
    seen = Seen(replace(config, **changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKDIFF_CACHE", str(folder / "cache"))
        train(seen.config, progress=False, trainer_class=partial(Watched, seen=seen))
    assert len(seen.norms) == STEPS
    return seen


@pytest.fixture(scope="module", params=RUNS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return watch(tmp_path_factory.mktemp("run"), **RUNS[request.param])


def test_adam_is_the_papers(seen: Seen) -> None:
    for group in (group for groups in seen.groups for group in groups):
        assert tuple(group["betas"]) == (0.9, 0.999) and group["eps"] == 1e-8


def test_the_weight_decay_is_of_all_but_the_biases(seen: Seen) -> None:
    wanted = {seen.config.weight_decay, 0.0}
    assert {group["weight_decay"] for groups in seen.groups for group in groups} == wanted
    if seen.config.weight_decay:
        assert "layers.0.qkv.weight" in seen.decayed
    assert not any("bias" in name for name in seen.decayed)


def test_the_learning_rate_follows_its_schedule(seen: Seen) -> None:
    for step, groups in enumerate(seen.groups):
        done = (step - WARMUP) / (STEPS - WARMUP)
        after = {
            "constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2,
        }[seen.config.lr_schedule]  # fmt: skip
        expected = seen.config.lr * (step / WARMUP if step < WARMUP else after)
        assert [group["lr"] for group in groups] == pytest.approx([expected] * len(groups)), step


def test_the_gradient_is_cut_at_its_norm(seen: Seen) -> None:
    most = seen.config.max_grad_norm
    assert max(seen.norms) > 0
    if most == 0.01:
        assert seen.norms == pytest.approx([most] * STEPS, rel=1e-2)
    elif most == 0:
        assert max(seen.norms) > 1, "what the default would cut"
    else:
        assert max(seen.norms) == pytest.approx(most, rel=1e-2)


def test_bf16_is_autocast_in_training_and_validation(seen: Seen) -> None:
    steps = STEPS * seen.config.accumulate
    assert len(seen.autocast) > steps, "validated as well"
    assert set(seen.autocast) == {seen.config.precision == "bf16"}


def test_every_micro_batch_has_its_own_dropout_and_masks(seen: Seen) -> None:
    micro = STEPS * seen.config.accumulate
    assert len(set(seen.seeds)) == len(seen.seeds) == micro
    masks = torch.cat(seen.noise).view(STEPS, seen.config.batch_size, -1)
    for rows in masks:
        assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_the_masks_of_a_step_are_the_same_however_it_is_cut(tmp_path: Path) -> None:
    whole, parts = (watch(tmp_path / str(n), accumulate=n) for n in (1, 4) if not
                    (tmp_path / str(n)).mkdir())  # fmt: skip
    assert torch.equal(torch.cat(whole.noise), torch.cat(parts.noise))


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.7, 0.9999])
def test_the_average_follows_its_decay(decay: float) -> None:
    """d = min(decay, (1 + n)/(10 + n)) after n updates; the first takes the weights as they are."""
    model = nn.Linear(1, 1)
    ema = Average(model, decay)
    expected = 0.0
    for n in range(40):
        value = math.sin(n) + 2
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
        d = min(decay, (1 + n) / (10 + n)) if n else 0.0
        expected = d * expected + (1 - d) * value
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-5), n


def test_an_average_asks_its_device_nothing() -> None:
    """A tensor on `meta` has no values: whoever read one, as a GPU would be waited for, fails."""
    model = nn.Linear(3, 2, device="meta")
    ema = Average(model, 0.9)
    assert ema.n_averaged.device.type == "cpu"
    with Operators() as seen:
        for _ in range(3):
            ema.update_parameters(model)
    assert int(ema.n_averaged) == 3
    assert "_foreach_lerp_" in seen.names and "_to_copy" not in seen.names
    assert not any(p.requires_grad for p in ema.parameters())


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_a_streams_batches_are_pinned_for_a_gpu(device: str, pinned: bool) -> None:
    arguments = SimpleNamespace(
        device=torch.device(device), per_device_train_batch_size=2, dataloader_num_workers=0,
        dataloader_pin_memory=True,
    )  # fmt: skip
    trainer: Any = SimpleNamespace(train_dataset=Endless(), args=arguments)
    assert BlockDiffusionTrainer.get_train_dataloader(trainer).pin_memory is pinned


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())
