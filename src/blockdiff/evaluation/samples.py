"""How good generated texts are; no single figure tells.

Generative perplexity alone is won by dull text, so it never comes without the entropy of each
sample, the diversity of all of them, and the distance of their n-grams from real text:

    entropy      −Σ_v p_v log p_v of the tokens of one sample, in nats
    distinct-n   different n-grams over n-grams, all samples together
    divergence   Jensen-Shannon, in nats (0 … log 2), of the n-grams of samples and reference,
                 as many tokens of each
    MAUVE        of the judge's hidden states of samples and reference (see `mauve`), on request

All but the first depend on how much text there is: compare like with like, and with the figures of
real text of the same amount, which stand beside them.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from blockdiff.data.corpora import load_corpus
from blockdiff.data.tokenizers import load_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation.corpus import open_documents
from blockdiff.evaluation.judge import Judge, load_judge
from blockdiff.evaluation.likelihood import perplexity_of
from blockdiff.evaluation.mauve import FEW_TEXTS, NOTE, Mauve, mauve, require_mauve
from blockdiff.evaluation.options import SampleOptions
from blockdiff.evaluation.statistics import mean_error, ratio_error
from blockdiff.printing import table_text
from blockdiff.progress import advance
from blockdiff.sampling.stopping import token_entropy

HALVES = 50
ORDERS = (1, 2, 3, 4)
# Of the generation's own record, where it came with one.
COST = ("nfe", "tokens", "finish", "seconds", "rejection_rate")

REAL = "real text"

Ids = Sequence[int]


@dataclass(frozen=True)
class Measured:
    """A figure and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class SampleQuality:
    """What was measured of a set of texts.

    `perplexity` under the judge (None without one); `entropy` in nats per token, mean of the
    samples; `distinct` and `divergence` by n (divergence None without a reference); lengths in
    tokens. `cost`: NFE a sample, tokens per NFE and second, where the generation recorded them.
    """

    samples: int
    perplexity: Measured | None
    entropy: Measured
    distinct: dict[int, Measured]
    divergence: dict[int, Measured] | None
    length_median: float
    length_max: int
    rejection_rate: float | None
    cost: dict[str, float] | None
    mauve: Mauve | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def read_samples(path: str) -> tuple[list[str], dict[str, Any]]:
    """Texts, and what their generation recorded, from `generate --json` or any corpus file.

    Raises `InputError` when there is no text.
    """
    file = Path(path)
    if file.suffix == ".json" and file.is_file():
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            texts = record["texts"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{path} is not what blockdiff generate --json printed") from None
        if not isinstance(texts, list):
            raise InputError(f"{path}: texts is {type(texts).__name__}, not a list of texts")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                kind = "null" if text is None else type(text).__name__
                raise InputError(f"{path}: text {number} is {kind}, not a text")
        cost = {name: record[name] for name in COST if name in record}
    else:
        texts, cost = list(load_corpus(path)), {}
    if not texts:
        raise InputError(f"{path} holds no text")
    return texts, cost


def sample_quality(
    texts: Sequence[str],
    encode: Callable[[str], Ids],
    *,
    judge: Judge | None = None,
    reference: Sequence[str] | None = None,
    cost: Mapping[str, Any] | None = None,
    real_features: np.ndarray | None = None,
    seed: int = 0,
) -> SampleQuality:
    """Measures texts; `encode` gives the tokens whose statistics count.

    Standard errors are over samples, by the delta method for perplexity, by halves of the samples
    for what is no mean. `real_features`: the judge's of real texts, for MAUVE.
    """
    rows = [list(encode(text)) for text in texts]
    perplexity = None
    if judge is not None:
        with advance(f"{judge.name} reads {len(texts)} texts", None, "windows") as done:
            nats, count = (x.numpy().astype(float) for x in judge.nats(texts, done))
        error = ratio_error(nats, count)
        value = perplexity_of(nats.sum() / count.sum()) if count.sum() else math.nan
        perplexity = Measured(value, value * error if math.isfinite(value) else math.nan)
    # A text without tokens has no entropy, as it has no perplexity.
    entropies = np.array([token_entropy(row) for row in rows if row])
    entropy = float(entropies.mean()) if len(entropies) else math.nan
    lengths = cost["tokens"] if cost and "tokens" in cost else [len(row) for row in rows]
    real = None if reference is None else [list(encode(text)) for text in reference]
    return SampleQuality(
        samples=len(texts),
        perplexity=perplexity,
        entropy=Measured(entropy, mean_error(entropies)),
        distinct={n: _spread(rows, partial(distinct, n=n), seed) for n in ORDERS},
        divergence=None if real is None else divergences(rows, real, seed),
        length_median=float(np.median(lengths)),
        length_max=int(max(lengths)),
        rejection_rate=cost.get("rejection_rate") if cost else None,
        cost=_cost(cost) if cost and "nfe" in cost else None,
        mauve=None if real_features is None or judge is None
        else mauve(features_of(judge, texts), real_features, features=judge.name, seed=seed),
    )  # fmt: skip


def features_of(judge: Judge, texts: Sequence[str]) -> np.ndarray:
    """The judge's features [n, E] of texts."""
    with advance(f"{judge.name} reads {len(texts)} texts for MAUVE", len(texts), "texts") as done:
        return np.asarray(judge.features(texts, done).numpy())


def ngrams(rows: Iterable[Ids], n: int) -> Counter[tuple[int, ...]]:
    """Counts of n-grams, none across two samples."""
    found: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        found.update(zip(*(row[i:] for i in range(n)), strict=False))
    return found


def distinct(rows: Iterable[Ids], n: int) -> float:
    """Different n-grams over n-grams."""
    counts = ngrams(rows, n)
    return len(counts) / max(counts.total(), 1)


def divergence(rows: Sequence[Ids], reference: Sequence[Ids], n: int) -> float:
    """Jensen-Shannon divergence of n-grams in nats, of equally many tokens of both."""
    tokens = min(sum(map(len, rows)), sum(map(len, reference)))
    p, q = (ngrams(_first(x, tokens), n) for x in (rows, reference))
    total_p, total_q = max(p.total(), 1), max(q.total(), 1)
    result = 0.0
    for key in p.keys() | q.keys():
        a, b = p[key] / total_p, q[key] / total_q
        middle = (a + b) / 2
        result += sum(x / 2 * math.log(x / middle) for x in (a, b) if x > 0)
    return result


def _first(rows: Iterable[Ids], tokens: int) -> list[Ids]:
    """As many tokens of the rows as asked for, the last row cut."""
    taken: list[Ids] = []
    for row in rows:
        taken.append(list(islice(row, tokens)))
        tokens -= len(taken[-1])
        if tokens <= 0:
            break
    return taken


def _spread(rows: Sequence[Ids], statistic: Callable[[list[Ids]], float], seed: int) -> Measured:
    """A statistic of all rows, and its spread over samples of half of them.

    Drawing rows twice, as the bootstrap does, would be seen as repetition by what counts distinct
    n-grams; halves without replacement have as much spread as the whole has (for means exactly).
    """
    value = statistic(list(rows))
    if len(rows) < 4:
        return Measured(value, math.nan)
    rng = random.Random(seed)
    half = [statistic(rng.sample(list(rows), len(rows) // 2)) for _ in range(HALVES)]
    return Measured(value, float(np.std(half, ddof=1)))


def divergences(rows: Sequence[Ids], real: Sequence[Ids], seed: int) -> dict[int, Measured]:
    """`divergence` of single tokens and of pairs, with their errors."""
    return {n: _spread(rows, partial(divergence, reference=real, n=n), seed) for n in (1, 2)}


def _cost(cost: Mapping[str, Any]) -> dict[str, float]:
    nfe, tokens = np.array(cost["nfe"]), np.array(cost["tokens"])
    found = {"nfe": float(nfe.mean()), "tokens_per_nfe": float(tokens.sum() / max(nfe.sum(), 1))}
    if cost.get("seconds"):
        found["tokens_per_second"] = float(tokens.sum() / cost["seconds"])
    return found


def shuffled(texts: Sequence[str], seed: int = 0) -> list[str]:
    """The same words in random order: what a judge that works must find worse."""
    rng = random.Random(seed)
    out = []
    for text in texts:
        words = text.split()
        rng.shuffle(words)
        out.append(" ".join(words))
    return out


def measure_samples(wish: SampleOptions) -> dict[str, SampleQuality]:
    """Measures a file of samples; beside it the reference, and its words in random order.

    The reference is cut into pieces of `words` words, as many as there are samples. It tells what
    good figures are, and whether the judge can be trusted: it must find shuffled text worse. Raises
    `InputError` on bad input.
    """
    critic, encode = judge_and_tokens(wish)
    texts, cost = read_samples(wish.samples)
    measure = partial(sample_quality, encode=encode, judge=critic, seed=wish.seed)
    if wish.reference is None:
        return {"samples": measure(texts, cost=cost)}
    real, rest, features = reference_texts(wish, len(texts), critic)
    measure = partial(measure, reference=rest, real_features=features)
    return {
        "samples": measure(texts, cost=cost),
        REAL: measure(real),
        "real, shuffled": measure(shuffled(real, wish.seed)),
    }


def judge_and_tokens(wish: SampleOptions) -> tuple[Judge | None, Callable[[str], Ids]]:
    """The judge, and what gives the tokens that count; `InputError` where there is neither."""
    if wish.judge is None and wish.tokenizer is None:
        raise InputError("name a `judge`, or a `tokenizer` whose tokens are counted")
    if wish.mauve:
        require_mauve()
    critic = None if wish.judge is None else load_judge(wish.judge, wish.window, wish.device)
    if wish.tokenizer is None:
        assert critic is not None
        return critic, critic.encode
    return critic, partial(load_tokenizer(wish.tokenizer).encode, add_special_tokens=False)


def reference_texts(
    wish: SampleOptions, wanted: int, judge: Judge | None
) -> tuple[list[str], list[str], np.ndarray | None]:
    """`wanted` pieces of the reference, the rest to compare with, and its features for MAUVE."""
    assert wish.reference is not None
    documents = open_documents(
        wish.reference, part=wish.part, validation_fraction=wish.validation_fraction,
        split_seed=wish.split_seed, text_column=wish.text_column,
    )  # fmt: skip
    pieces = [" ".join(part) for text in documents for part in _cut(text.split(), wish.words)]
    random.Random(wish.seed).shuffle(pieces)
    real, rest = pieces[:wanted], pieces[wanted:]
    if not real or not rest:
        raise InputError(
            f"{wish.reference} gives {len(pieces)} pieces of {wish.words} words: less than the "
            "samples and something to compare them with; lower `words` or give more text"
        )
    if not wish.mauve:
        return real, rest, None
    assert judge is not None
    fewest = min(wanted, len(rest))
    if fewest < FEW_TEXTS:
        print(f"MAUVE of {fewest} texts is rough: give {FEW_TEXTS} or more", file=sys.stderr)
    return real, rest, features_of(judge, rest[:wanted])


def _cut(words: list[str], size: int) -> list[list[str]]:
    """Whole pieces of `size` words."""
    return [words[i : i + size] for i in range(0, len(words) - size + 1, size)]


def quality_table(found: Mapping[str, SampleQuality]) -> str:
    """Named sets of texts side by side, for people."""
    columns = [_lines(quality) for quality in found.values()]
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    table = table_text(["measure", *found], rows, 110)
    noted = any(quality.mauve is not None for quality in found.values())
    return f"{table.rstrip()}\nMAUVE: {NOTE}" if noted else table


def _lines(quality: SampleQuality) -> dict[str, str]:
    def cell(x: Measured | None, digits: int = 3) -> str:
        return "–" if x is None else f"{x.value:.{digits}f} ± {x.stderr:.{digits}f}"

    cost = quality.cost or {}
    lines = {
        "samples": str(quality.samples),
        "generative perplexity": cell(quality.perplexity, 2),
        "entropy of a sample, nats": cell(quality.entropy),
    }
    lines |= {f"distinct-{n}": cell(x) for n, x in quality.distinct.items()}
    for n in (1, 2):
        lines[f"divergence, {n}-grams"] = cell((quality.divergence or {}).get(n))
    if quality.mauve is not None:
        found = quality.mauve
        lines["MAUVE [95%]"] = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    lines["length, median / max"] = f"{quality.length_median:.0f} / {quality.length_max}"
    rate = quality.rejection_rate
    lines["rejected"] = "–" if rate is None else f"{rate:.1%}"
    for label, key in (("NFE a sample", "nfe"), ("tokens per NFE", "tokens_per_nfe"),
                       ("tokens per second", "tokens_per_second")):  # fmt: skip
        lines[label] = f"{cost[key]:.2f}" if key in cost else "–"
    return lines
