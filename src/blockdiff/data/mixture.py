"""Several corpora in given proportions: windows of each, as many as its weight says."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from blockdiff.checks import LARGEST_SIZE
from blockdiff.data.corpora import Corpus
from blockdiff.data.packing import StreamedWindows, Windows
from blockdiff.errors import InputError


class MixedWindows(Dataset[dict[str, Tensor]]):
    """Windows of several packed corpora as one data set, those of corpus i w_i of all.

    With `repeat` it is the shortest such set that has every window: of the corpora that are small
    for their weight, windows occur several times. Without, it is the longest in which none does.
    The order is the corpora's own, one behind the other; the sampler of the training shuffles it.

    Attributes:
        counts: how many windows each corpus gives.
        key: a hash of the corpora's own keys and of the counts.
        conversations: of conversations, what became of them in all corpora.
    """

    def __init__(
        self, parts: Sequence[Windows], weights: Sequence[float], *, repeat: bool = True
    ) -> None:
        """`weights`: one for each corpus, with sum 1. Raises `InputError` where one gives none."""
        self.parts = list(parts)
        lengths = [len(part) / weight for part, weight in zip(parts, weights, strict=True)]
        whole = max(lengths) if repeat else min(lengths)
        self.counts = [round(weight * whole) for weight in weights]
        if whole > LARGEST_SIZE:
            raise InputError(
                f"with `data_weights` an epoch would have {whole:.0e} windows, most of them again "
                "and again; give weights nearer to the sizes of the texts"
            )
        if not all(self.counts):
            raise InputError(
                f"the corpora have {', '.join(str(len(part)) for part in parts)} windows, of which "
                "`data_weights` leave one without any; give more text, or other weights"
            )
        self.ends = torch.tensor(self.counts).cumsum(0)
        said = json.dumps([[part.key for part in parts], self.counts])
        told: Counter[str] = Counter()
        for part in parts:
            told.update(getattr(part, "conversations", {}))
        self.conversations = dict(told)
        self.key = hashlib.sha256(said.encode()).hexdigest()

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        one = int(torch.searchsorted(self.ends, index, right=True))
        place = index - int(self.ends[one]) + self.counts[one]
        return self.parts[one][place % len(self.parts[one])]


class MixedStream(IterableDataset[dict[str, Tensor]]):
    """Endless streams of windows as one: each window is drawn from corpus i with probability w_i.

    Which one depends on the seed and on the number of the process and of its DataLoader worker.
    (`datasets.interleave_datasets` would draw documents, and a corpus of long ones would get more
    than its share of the tokens.)
    """

    def __init__(
        self, parts: Sequence[StreamedWindows], weights: Sequence[float], seed: int, process: int
    ) -> None:
        self.parts, self.weights = list(parts), list(weights)
        self.seed, self.process = seed, process

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        draw = random.Random(f"{self.seed} {self.process} {worker.id if worker else 0}")
        streams = [iter(part) for part in self.parts]
        while True:
            # Of all `random` draws, only random() is documented to stay the same in later Pythons.
            left = draw.random()
            one = 0
            while one < len(streams) - 1 and left >= self.weights[one]:
                left -= self.weights[one]
                one += 1
            window = next(streams[one], None)
            if window is None:  # no document was left for this worker
                return
            yield window


def chained(name: str, parts: Sequence[object]) -> Corpus:
    """The documents of several texts, one behind the other, to be read again and again."""
    return Corpus(name, tuple(partial(iter, part) for part in parts))
