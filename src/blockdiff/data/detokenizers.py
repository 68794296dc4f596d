"""Undoing what a benchmark's files did to their text, so that it reads as the text trained on does.

PTB, WikiText and LM1B put spaces around punctuation, and each has marks of its own. A perplexity
under a model of ordinary text says little while they are there. The rules are ours, written from
the data sets' conventions; other projects' differ in corners, and a perplexity moves with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from blockdiff.data.corpora import Corpus
from blockdiff.errors import InputError

Rules = Sequence[tuple[str, str]]

_CONTRACTIONS: Rules = (
    (r" (n't|'(?:s|re|ve|ll|d|m))\b", r"\1"),
    (r"(?<=s) '(?=\s|$)", "'"),
)
# Each pattern reads a run of spaces from its beginning only, and a quotation from one mark to the
# next: time is linear in the text, whatever the text.
_QUOTES: Rules = ((r'(?<!\S)" +([^" ](?:[^"]*[^" ])?) +"(?!\w)', r'"\1"'),)
_PUNCTUATION: Rules = (
    (r"([(\[{]) +", r"\1"),
    (r"(?<! ) +([)\]}])", r"\1"),
    (r"(?<! ) +([.,;:!?%])(?=[\s\"')\]]|$)", r"\1"),
)
_CURRENCY: Rules = ((r"([$£€#]) +(?=\d)", r"\1"),)

_RULES: dict[str, Rules] = {
    # `@-@` joins what the tokenizer took apart; `= = Title = =` is a heading.
    "wikitext": (
        (r" ?@([-,.])@ ?", r"\1"),
        (r"(?<==) (?==)", ""),
        *_CONTRACTIONS,
        *_QUOTES,
        *_PUNCTUATION,
        *_CURRENCY,
    ),
    # Lower case, without punctuation; N stands for a number and <unk> for a rare word.
    "ptb": ((r"\\/", "/"), (r"\bN\b", "1"), (r"<unk>", "?"), *_CONTRACTIONS, *_CURRENCY),
    "lm1b": (
        (r"\b(https?) : / / ", r"\1://"),
        *_CONTRACTIONS,
        *_QUOTES,
        *_PUNCTUATION,
        *_CURRENCY,
    ),
    "lambada": ((r"[“”]|``|''", '"'), (r"[‘’]", "'")),
    "scientific": (*_CONTRACTIONS, *_QUOTES, *_PUNCTUATION),
}
DETOKENIZERS = ("none", *_RULES)


def detokenize(text: str, name: str) -> str:
    """`text` by the rules of a data set of `DETOKENIZERS`, in their order, stripped.

    Raises `InputError` for another name.
    """
    return _detokenizer(name)(text)


def detokenized(corpus: Corpus, name: str) -> Corpus:
    """The corpus with each document through `detokenize`; raises `InputError` for no such name."""
    clean = _detokenizer(name)
    if name == "none":
        return corpus

    def read(reader: Callable[[], Iterable[str]]) -> Iterator[str]:
        return map(clean, reader())

    return replace(corpus, readers=tuple(partial(read, reader) for reader in corpus.readers))


def _detokenizer(name: str) -> Callable[[str], str]:
    if name not in DETOKENIZERS:
        raise InputError(f"no detokenizer {name!r}; choose one of {', '.join(DETOKENIZERS)}")
    rules = [(re.compile(pattern), new) for pattern, new in _RULES.get(name, ())]

    def clean(text: str) -> str:
        for pattern, new in rules:
            text = pattern.sub(new, text)
        return text.strip()

    return clean if rules else lambda text: text
