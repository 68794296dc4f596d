"""LAMBADA for lm_eval from a file of passages, without the hub: `!function` of the tasks beside.

The file, JSON lines with a `text` each (.xz and .gz too), is named by the environment variable
LAMBADA. A passage is its words up to the last, which is asked for; for the choice three others
stand beside it, the last words of other passages, drawn with a fixed seed.
"""

from __future__ import annotations

import os
import random
from typing import Any

from datasets import Dataset

from blockdiff.data.corpora import load_corpus

SEED = 0
OTHERS = 3


def passages(**_: Any) -> dict[str, Dataset]:
    """What the tasks ask for as their `custom_dataset`."""
    if "LAMBADA" not in os.environ:
        raise SystemExit("LAMBADA is not set: let it name the file of passages")
    pairs = [text.rsplit(" ", 1) for text in load_corpus(os.environ["LAMBADA"]) if " " in text]
    words = sorted({word for _, word in pairs})
    draw = random.Random(SEED)
    docs = []
    for context, word in pairs:
        choices = [word, *draw.sample([other for other in words if other != word], OTHERS)]
        draw.shuffle(choices)
        docs.append({"context": context, "word": word, "choices": choices,
                     "answer": choices.index(word)})  # fmt: skip
    return {"test": Dataset.from_list(docs)}
