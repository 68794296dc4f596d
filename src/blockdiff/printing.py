"""What is printed stays what it is: no name or text is read as markup or obeyed by a terminal.

Imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

# A model that writes bytes can write an escape sequence; shown as pictures they do nothing.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, as pictures."""
    return text.translate(_CONTROLS)


def plain_console(**options: Any) -> Console:
    """A console that prints `[b]`, `:smile:` and numbers as they are; `options` are rich's."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def table_text(table: Table, width: int) -> str:
    """A table as lines of text."""
    console = plain_console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return printable(capture.get().rstrip())
