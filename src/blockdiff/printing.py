"""What is printed stays what it is: no name or text is read as markup or obeyed by a terminal.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Sequence[str]

# A model that writes bytes can write an escape sequence; shown as pictures they do nothing.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, as pictures."""
    return text.translate(_CONTROLS)


def names_of(data: object) -> str:
    """A corpus, or several: files without their folders, hub ids whole."""
    each = [str(one) for one in (data if isinstance(data, list | tuple) else [data]) if one]
    return ", ".join(Path(one).name if Path(one).exists() else one for one in each)


def plain_console(**options: Any) -> Console:
    """A console that prints `[b]`, `:smile:` and numbers as they are; `options` are rich's."""
    return Console(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and its reports, while entered."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def make_table(head: Row, rows: Iterable[Row | None], *, left: int = 0, **options: Any) -> Table:
    """A table whose column `left` is words and the others figures; None parts two rows.

    `options` are rich's: title, caption.
    """
    table = Table(**options)
    for i, heading in enumerate(head):
        table.add_column(heading, justify="left" if i == left else "right")
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


def table_text(head: Row, rows: Iterable[Row | None], width: int, **options: Any) -> str:
    """`make_table`'s table as lines of text."""
    table = make_table(head, rows, **options)
    console = plain_console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return printable(capture.get().rstrip())


def markdown_table(head: Row, rows: Iterable[Row]) -> str:
    """A table as Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
