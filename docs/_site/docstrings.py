"""Reads the package's docstrings as griffe reads Google's: a section "Example:" is "Examples:"."""

from typing import Any

import griffe


class OneExample(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
