"""The table of n-grams that stands beside a model: see `models.ngrams`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blockdiff.categorical import Array
from blockdiff.device import choose_device
from blockdiff.errors import InputError
from blockdiff.evaluation.corpus import documents_of_run, text_options
from blockdiff.models.loading import load
from blockdiff.models.ngrams import FILE, Table
from blockdiff.outputs import local_path
from blockdiff.progress import advance


def write_draft_table(
    source: str, options: Any, device: str | None = None, **opening: Any
) -> tuple[Table, Path]:
    """Writes the table of a text into a model's folder; `options`: the command line's.

    `opening`: how `load` opens the model. Raises `InputError` where the model is no folder, or the
    text is none.
    """
    folder = local_path("model", source)
    if not folder.is_dir():
        raise InputError(f"{source} is no folder, and the table is written into it")
    model, tokenizer = load(
        folder, tokenizer=options.tokenizer, device=choose_device(device), **opening
    )
    documents, _, _ = documents_of_run(folder, options.data, text_options(options))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def texts() -> Iterator[Array]:
        with advance(f"Counting {options.data}", None, "documents") as done:
            for document in documents:
                ids = tokenizer.encode(document, add_special_tokens=False)
                yield np.array([*ids, *end], np.int64)
                done(1)

    table = Table.of_all(texts(), model.config.vocab_size)
    table = table.common(options.min_count)
    if not len(table.key):
        often = f" {options.min_count} times" if options.min_count > 1 else ""
        raise InputError(f"the text of {options.data} has no three tokens in a row{often}")
    table.save(folder)
    return table, folder / FILE
