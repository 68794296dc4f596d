"""The embedded corpus: English every Python installation carries, so nothing is downloaded."""

import ast
import functools
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from blockdiff.errors import InputError

_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
_SHORTEST = 40  # characters; below it a docstring is a label ("See base class.") rather than prose
# A prompt and what follows it to the next blank line: the code and its printed result.
_DOCTEST = re.compile(r"^[ \t]*>>>.*\n?(?:[ \t]*\S.*\n?)*", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def pydoc_documents() -> tuple[str, ...]:
    """The language reference and the standard library's docstrings, without doctests.

    One document for each topic of `help()`, then one for each module: its docstring and those of
    its classes and functions, in source order. Modules are parsed, never imported. The text is
    that of the running Python, so it differs a little between Python versions.

    Raises:
        InputError: this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python has no pydoc_data, so no corpus 'pydoc': install its full standard "
            "library or give a text file"
        ) from error
    pages = [_prose(topics[name]) for name in sorted(topics)]
    library = Path(sysconfig.get_path("stdlib"))
    pages += ["\n\n".join(_docstrings(path)) for path in _modules(library)]
    return tuple(dict.fromkeys(page for page in pages if page))


def _modules(library: Path) -> list[Path]:
    found = (path.relative_to(library) for path in library.rglob("*.py"))
    kept = (path for path in found if _SKIPPED_FOLDERS.isdisjoint(path.parts))
    return [library / path for path in sorted(kept, key=lambda path: path.as_posix())]


def _docstrings(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes such as "\d"
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates that only look like Python
            return []
    prose = (_prose(docstring) for docstring in _raw_docstrings(tree))
    return [text for text in prose if len(text) >= _SHORTEST]


def _raw_docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, _DOCUMENTED):
        docstring = ast.get_docstring(node, clean=True)
        if docstring is not None:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _raw_docstrings(child)


def _prose(text: str) -> str:
    return _BLANK_LINES.sub("\n\n", _DOCTEST.sub("", text)).strip()
