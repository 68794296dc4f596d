"""The table of n-grams that stands beside a model: see `models.ngrams`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from blockdiff.categorical import Array
from blockdiff.errors import InputError
from blockdiff.evaluation.corpus import DEFAULTS, PACKING, open_documents, options_of_run
from blockdiff.models.loading import load
from blockdiff.models.ngrams import FILE, Table
from blockdiff.outputs import local_path
from blockdiff.progress import advance


def write_draft_table(options: Any) -> tuple[Table, Path]:
    """Writes the table of a text into a model's folder; `options`: the command line's.

    Raises `InputError` where the model is no folder, or the text is none.
    """
    folder = local_path("model", options.model)
    if not folder.is_dir():
        raise InputError(f"{options.model} is no folder, and the table is written into it")
    model, tokenizer = load(folder, tokenizer=options.tokenizer)
    told = {name: getattr(options, name, None) for name in DEFAULTS}
    data, settings, part = options_of_run(folder, options.data, told)
    reading = {k: v for k, v in settings.items() if k not in (*PACKING, "part")}
    documents = open_documents(data, part=part, **reading)
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
