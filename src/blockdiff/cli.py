"""The command line: `blockdiff train | evaluate | variance | generate | …`.

Bad input ends in one line on standard error and exit code 2. Nothing heavy is imported before a
command is known and its options are read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import click

from blockdiff.allocator import keep_freed_memory
from blockdiff.commands import COMMANDS, completion
from blockdiff.commands.hints import hint_command
from blockdiff.commands.options import Given, Parser, as_typed
from blockdiff.errors import InputError, RunStopped
from blockdiff.outputs import write_failure
from blockdiff.printing import quiet_transformers


def parse(words: Sequence[str]) -> tuple[str, Given]:
    """(command, what it was told).

    Raises `InputError` for words that mean nothing, and click's `Exit` once help is printed.
    """
    from blockdiff import __version__

    first = words[0].replace("_", "-") if words else ""
    if first in COMMANDS:
        return first, Parser(first, COMMANDS[first]).read(words[1:])
    if first in ("--help", "-h", "help"):
        _help().main([*words[1:2], "--help"], "blockdiff", standalone_mode=False)
        raise click.exceptions.Exit
    if first == "--version":
        print(f"blockdiff {__version__}")
        raise click.exceptions.Exit
    if not words:
        raise InputError(f"name a command: {', '.join(COMMANDS)}; see blockdiff --help")
    near = hint_command(first, COMMANDS)
    kind = "option" if first.startswith("-") else "command"
    hint = f"did you mean {near}?" if near else "see blockdiff --help"
    raise InputError(f"unknown {kind} {words[0]!r}; {hint}")


class _Help(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _help() -> click.Group:
    return _Help(
        commands={name: Parser(name, command) for name, command in COMMANDS.items()},
        help="Block diffusion language models: train, measure and sample them.",
        epilog='\b\nExamples:\n  blockdiff generate starter "The people of the United States"\n'
        "  blockdiff train notes.txt --out runs/notes\n  blockdiff train --help",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )


def fail(message: str, code: int = 2) -> NoReturn:
    print(f"blockdiff: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; exit code 0, or 2 with one line on standard error."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _any_character():
        if asked := completion.asked():
            return completion.answer(asked, COMMANDS)
        try:
            name, given = parse(sys.argv[1:] if argv is None else argv)
        except click.exceptions.Exit:
            raise SystemExit(0) from None
        except InputError as error:
            fail(str(error))
        keep_freed_memory()
        try:
            with _quiet():
                COMMANDS[name].run(given)
        except InputError as error:
            code = error.exit_code if isinstance(error, RunStopped) else 2
            fail(as_typed(str(error), COMMANDS[name]), code)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            failure = write_failure(error)
            if failure is None:
                raise
            resume = ", then continue with --resume" if name == "train" else ""
            fail(f"{failure}{resume}; what was saved before is whole")


@contextmanager
def _any_character() -> Iterator[None]:
    """An output stream that cannot encode a character replaces it."""
    former = {}
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            former[stream] = stream.errors
            stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in former.items():
            stream.reconfigure(errors=errors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' chatter out of our output, while a command runs."""
    import warnings

    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
        warnings.showwarning = lambda message, *place: print(
            f"blockdiff: {message}", file=sys.stderr
        )
        yield


if __name__ == "__main__":
    main()
