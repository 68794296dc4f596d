"""The floors of the house: an import goes down or within its floor, never up, never in a circle."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import blockdiff

SOURCE = Path(blockdiff.__file__).parent
FLOORS = [
    [
        "allocator",
        "auto",
        "categorical",
        "checks",
        "device",
        "errors",
        "folders",
        "layout",
        "outputs",
        "plugins",
        "printing",
        "progress",
        "recipes",
        "registry",
        "schedules",
        "starter",
        "version",
    ],
    ["noising", "estimators", "attention", "attention.*", "cache", "data", "data.*"],
    ["models", "models.*"],
    ["drafting", "laws", "objectives", "sampling", "sampling.*"],
    ["training", "training.*", "evaluation", "evaluation.*", "jobs"],
    ["", "api", "chat", "conversation", "infilling", "many", "plots", "replay", "watch", "writing"],
    ["apps", "apps.*", "recipes.*"],
    ["__main__", "cli", "commands*", "serving", "serving.*"],
]
# Above floor 2 a network is known by what may be asked of it, not by its class. These may name it:
# the package's own names, what opens or builds a network, and the applications.
KNOW_THE_CLASS = ["", "api", "apps*", "commands*", "training.building"]
LIGHT = [
    *("evaluation.options", "training.config", "training.stored", "sampling.options", "cli"),
    *("commands", "folders", "registry"),
]
# The whole paper, to be read in this order.
READERS_PATH = ["schedules", "noising", "objectives", "sampling.engine", "training.trainer"]


def module_name(path):
    """`models.dit` for models/dit.py, `models` for models/__init__.py, "" for the package."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def floor(module):
    floors = [i for i, names in enumerate(FLOORS) if any(fnmatch(module, n) for n in names)]
    assert len(floors) == 1, f"{module!r} has no floor of its own; give it one in FLOORS"
    return floors[0]


def statements(tree):
    """Every node but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (inner for other in node.orelse for inner in [other, *statements(other)])
            continue
        yield node
        yield from statements(node)


def imports(tree, package):
    """Names of our modules imported anywhere in the tree; `package` resolves relative ones."""
    for node in statements(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["blockdiff", *package][: 1 + len(package) - (node.level - 1)]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "blockdiff":
                inner = name.partition(".")[2]
                # `from blockdiff.layout import BlockLayout` names a thing in a module.
                yield inner if inner in MODULES else inner.rpartition(".")[0]


def graph():
    edges = {}
    for module, path in MODULES.items():
        own_package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        package = [part for part in own_package.split(".") if part]
        edges[module] = set(imports(tree, package)) - {module}
    return edges


GRAPH = graph()


def test_every_module_has_a_floor():
    assert {"", "cli", "models.dit", "training.config"} <= set(MODULES)
    for module in MODULES:
        floor(module)


@pytest.mark.parametrize("module", list(MODULES), ids=lambda m: m or "blockdiff")
def test_imports_never_go_up(module):
    for imported in GRAPH[module]:
        # The package itself holds nothing but its version; anything else in it is a floor above.
        assert not imported or floor(imported) <= floor(module), f"{module} imports {imported}"


def test_only_the_faces_import_the_package_itself():
    assert all(floor(module) >= 5 for module, imported in GRAPH.items() if "" in imported)


def test_only_commands_import_applications():
    for module, imported in GRAPH.items():
        if any(name.startswith("apps") for name in imported):
            assert module.startswith(("apps", "commands.")), f"{module} imports an application"


def test_above_the_networks_nobody_names_their_class():
    """Any network that can be asked the same goes through objectives, sampler and trainer."""
    naming = {
        module
        for module, path in MODULES.items()
        if floor(module) > 2
        and not any(fnmatch(module, name) for name in KNOW_THE_CLASS)
        and re.search(r"\bDiT\b", path.read_text(encoding="utf-8"))
    }
    assert naming == set()


def test_the_readers_path_is_short_and_never_looks_back():
    lines = {name: len(MODULES[name].read_text("utf-8").splitlines()) for name in READERS_PATH}
    assert sum(lines.values()) < 900, lines
    for place, module in enumerate(READERS_PATH):
        assert not GRAPH[module] & set(READERS_PATH[place + 1 :]), module
    shown = " → ".join(f"{name.replace('.', '/')}.py" for name in READERS_PATH)
    readme = " ".join((SOURCE.parents[1] / "README.md").read_text("utf-8").split())
    assert shown in readme and f"five files of {sum(lines.values())} lines" in readme


def test_no_file_is_long():
    for module, path in MODULES.items():
        assert len(path.read_text("utf-8").splitlines()) <= 400, module


def test_there_is_no_circle():
    try:
        tuple(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(f"imports go in a circle: {error.args[1]}")


def test_the_reading_of_imports_sees_what_it_should():
    """The floors are only as good as this reader."""
    code = """
import blockdiff.cache
from blockdiff import layout, __version__
from blockdiff.models.dit import DiT
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from blockdiff import api
def f():
    from .options import SamplingOptions
    from ..errors import InputError
"""
    found = set(imports(ast.parse(code), ["sampling"]))
    assert found == {"cache", "layout", "", "models.dit", "sampling.options", "errors"}


@pytest.mark.parametrize("module", LIGHT)
def test_the_command_line_starts_without_torch(module):
    """Neither directly nor through anything imported on the way."""
    code = (
        f"import sys, blockdiff.{module}; "
        "print(*{'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
