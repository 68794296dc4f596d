"""Modules and files from outside that register something, imported because the user named them.

A name comes from the command line, from a local YAML file or from Python, never from a model's
folder or a run's record: to open what somebody else made runs no code of theirs.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from blockdiff.errors import InputError

_loaded: dict[str, ModuleType] = {}


def load_plugin(name: str) -> ModuleType:
    """Imports a plugin, a module's name or the path of a .py file; once for a process.

    Raises `InputError`, in one line, when there is no such thing or its own code fails.

    Example:
        >>> from pathlib import Path
        >>> from blockdiff.plugins import load_plugin
        >>> _ = Path("mine.py").write_text("answer = 42")
        >>> load_plugin("mine.py").answer
        42
    """
    is_file = name.endswith(".py") or "/" in name
    key = str(Path(name).expanduser().resolve()) if is_file else name
    if is_file and not Path(key).is_file():
        raise InputError(f"there is no plugin file {name}")
    if key not in _loaded:
        try:
            _loaded[key] = _from_file(Path(key)) if is_file else import_module(name)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                hint = f"for a file, give its path, for example ./{name}.py"
                raise InputError(f"there is no module {name} to plug in; {hint}") from None
            said = " ".join(str(error).split())
            reason = said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"
            raise InputError(f"the plugin {name} cannot be used: {reason}") from error
    return _loaded[key]


def loaded_plugins() -> list[str]:
    """Those imported in this process: module names, and files as absolute paths."""
    return list(_loaded)


def _from_file(path: Path) -> ModuleType:
    name = f"blockdiff_plugin_{path.stem}_{len(_loaded)}"
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for what it defines
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
