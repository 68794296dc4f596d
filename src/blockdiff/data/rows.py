"""What of a row is its document: the text of a column, a conversation, a prompt with its response.

Rows are JSON lines, rows of Parquet and rows of a data set. A document is a text whatever the
format, so that all are split, hashed and mixed alike; that of a conversation is JSON:

    chat    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    prompt  ["2 + 2 =", " 4"]
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from blockdiff.errors import InputError

ROLES = ("system", "user", "assistant", "tool")
# What the two sides of a pair are called; the first name a row has is taken.
PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("response", "completion", "output", "answer")
_MATERIAL = "input"  # what an instruction is about, in data sets made after Alpaca's
_MOST_NAMED = 20  # columns in a message


@dataclass(frozen=True)
class Rows:
    """How rows are read.

    Attributes:
        format: text, chat or prompt.
        text_column: the column of the text; of a chat the messages, "text" standing for "messages".
    """

    format: str = "text"
    text_column: str = "text"

    @property
    def column(self) -> str:
        """The one column that is read of a text or a chat."""
        chat = self.format == "chat" and self.text_column == "text"
        return "messages" if chat else self.text_column

    def columns(self, names: Collection[str], where: str) -> list[str]:
        """Those that are read of a table's; `InputError` where what is needed is not among them."""
        if self.format == "prompt":
            material = [_MATERIAL] if _MATERIAL in names else []
            return [*_sides(names, where), *material]
        require_column(names, self.column, where)
        return [self.column]

    def document(self, row: Mapping[str, Any], where: str) -> str:
        """A row's document, "" where its text is null; `InputError` when it has none."""
        if self.format == "text":
            return text_of(row, self.text_column, where)
        if self.format == "prompt":
            return json.dumps(_pair(row, where), ensure_ascii=False)
        require_column(row, self.column, where)
        messages = row[self.column]
        if not isinstance(messages, list) or not messages:
            kind = "no messages" if messages == [] else f"{type(messages).__name__}, not a list"
            raise InputError(f"{where}: column {self.column!r} holds {kind}")
        told = [_message(one, f"{where}: message {i}") for i, one in enumerate(messages, start=1)]
        return json.dumps(told, ensure_ascii=False, default=str)

    def whole_file(self, name: str) -> None:
        """Raises `InputError` where a text file is no document of this format."""
        if self.format != "text":
            raise InputError(
                f"{name} is plain text, which has no {self.format}; give JSON lines, Parquet or a "
                "data set"
            )


def text_of(row: Mapping[str, Any], text_column: str, where: str) -> str:
    """The text of one row, "" for a null; `InputError` when it has none that is Unicode."""
    require_column(row, text_column, where)
    text = row[text_column]
    return "" if text is None else _text(text, f"{where}: column {text_column!r}", where)


def require_column(columns: Iterable[str], text_column: str, where: str) -> None:
    """Raise `InputError` naming the columns there are, unless `text_column` is one of them."""
    if text_column not in columns:
        raise InputError(
            f"{where}: no column {text_column!r}; it has {_named(columns)}; rename the one that "
            "holds the text, or name it as `text_column`"
        )


def _named(columns: Iterable[str]) -> str:
    names = [repr(column) for column in islice(columns, _MOST_NAMED + 1)]
    return ", ".join([*names[:_MOST_NAMED], "..."] if names[_MOST_NAMED:] else names) or "none"


def _text(text: object, what: str, where: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{what} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half a surrogate pair in the text; repair or drop it"
        ) from error
    return text


def _message(message: object, where: str) -> dict[str, Any]:
    """A message without what is null; `InputError` unless it has a known role and a text."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(f"{where} has no role and content")
    if message["role"] not in ROLES:
        raise InputError(f"{where} has the role {message['role']!r}; known are {', '.join(ROLES)}")
    _text(message["content"], where, where)
    return {name: value for name, value in message.items() if value is not None}


def _sides(names: Collection[str], where: str) -> tuple[str, str]:
    """The columns of the prompt and of the response."""
    found = [next((x for x in side if x in names), None) for side in (PROMPTS, RESPONSES)]
    if found[0] is None or found[1] is None:
        raise InputError(
            f"{where}: no prompt with a response; it has {_named(names)}; call the two prompt and "
            "response"
        )
    return found[0], found[1]


def _pair(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    names = _sides(row.keys(), where)
    prompt, response = (_text(row[name], f"{where}: column {name!r}", where) for name in names)
    if names[0] == "instruction" and row.get(_MATERIAL):
        prompt += "\n\n" + _text(row[_MATERIAL], f"{where}: column {_MATERIAL!r}", where)
    return prompt, response
