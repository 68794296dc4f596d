"""Block diffusion language models: train, measure and sample.

The names below are loaded when first used, so that the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockdiff.api import TextGeneration, generate, load, score, stream
    from blockdiff.errors import InputError
    from blockdiff.estimators import Estimator
    from blockdiff.evaluation.likelihood import Likelihood, likelihood
    from blockdiff.evaluation.score import Score
    from blockdiff.infilling import Filled, infill
    from blockdiff.laws import Objective
    from blockdiff.layout import BlockLayout
    from blockdiff.models.adapted import Adapted
    from blockdiff.models.adapting import adapt
    from blockdiff.models.card import model_card
    from blockdiff.models.config import DiTConfig
    from blockdiff.models.dit import DiT
    from blockdiff.models.hub import load_model, save_model
    from blockdiff.registry import (
        register_estimator,
        register_objective,
        register_order,
        register_schedule,
        register_stopping_rule,
    )
    from blockdiff.sampling.engine import Engine
    from blockdiff.sampling.options import SamplingOptions
    from blockdiff.sampling.orders.base import Order
    from blockdiff.sampling.step import Step
    from blockdiff.schedules import Schedule
    from blockdiff.training.config import TrainConfig
    from blockdiff.training.run import train

from blockdiff import auto
from blockdiff.version import VERSION

__version__ = VERSION

auto.register()

_HOMES = {
    "TextGeneration": "api",
    "generate": "api",
    "load": "api",
    "score": "api",
    "stream": "api",
    "Filled": "infilling",
    "infill": "infilling",
    "Score": "evaluation.score",
    "InputError": "errors",
    "Estimator": "estimators",
    "Objective": "laws",
    "Likelihood": "evaluation.likelihood",
    "likelihood": "evaluation.likelihood",
    "BlockLayout": "layout",
    "DiT": "models.dit",
    "DiTConfig": "models.config",
    "Adapted": "models.adapted",
    "adapt": "models.adapting",
    "load_model": "models.hub",
    "model_card": "models.card",
    "save_model": "models.hub",
    "register_estimator": "registry",
    "register_objective": "registry",
    "register_order": "registry",
    "register_schedule": "registry",
    "register_stopping_rule": "registry",
    "Schedule": "schedules",
    "SamplingOptions": "sampling.options",
    "Step": "sampling.step",
    "Engine": "sampling.engine",
    "Order": "sampling.orders.base",
    "TrainConfig": "training.config",
    "train": "training.run",
}

__all__ = [
    "Adapted",
    "BlockLayout",
    "DiT",
    "DiTConfig",
    "Engine",
    "Estimator",
    "Filled",
    "InputError",
    "Likelihood",
    "Objective",
    "Order",
    "SamplingOptions",
    "Schedule",
    "Score",
    "Step",
    "TextGeneration",
    "TrainConfig",
    "adapt",
    "generate",
    "infill",
    "likelihood",
    "load",
    "load_model",
    "model_card",
    "register_estimator",
    "register_objective",
    "register_order",
    "register_schedule",
    "register_stopping_rule",
    "save_model",
    "score",
    "stream",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'blockdiff' has no attribute {name!r}")
    value = getattr(import_module(f"blockdiff.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
