"""`import blockdiff` is enough for `AutoConfig` and `AutoModel` of `transformers` to know a `DiT`,
and for lm-evaluation-harness to know the model `blockdiff`.

What is registered needs torch, which the package loads when it is used: so it is registered when
the Auto classes themselves are loaded, or at once where they are already.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Module where others look names up → ours, which registers itself there, or a function that does.
_HOMES = {
    "transformers.models.auto.configuration_auto": "blockdiff.models.config",
    "transformers.models.auto.modeling_auto": "blockdiff.models.dit",
    "lm_eval.models": "lm_eval_blockdiff:register",
}


def register() -> None:
    """Once for a process; again it does nothing."""
    for name in _HOMES.keys() & sys.modules.keys():
        _load(name)
    if not any(isinstance(finder, _Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follower())


def _load(name: str) -> None:
    home, _, function = _HOMES[name].partition(":")
    if function:
        getattr(import_module(home), function)()
    # One that is being loaded right now registers itself at its end.
    elif home not in sys.modules:
        import_module(home)


class _Follower(MetaPathFinder):
    """Finds nothing itself; loads ours after an Auto class's module was found and loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _HOMES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_ours(module: ModuleType) -> None:
                execute(module)
                _load(name)

            spec.loader.exec_module = then_ours  # type: ignore[method-assign]
        return spec
