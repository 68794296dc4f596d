"""Undoing what a benchmark's files did to their text, so that it reads as the text trained on does.

PTB, WikiText and LM1B put spaces around punctuation, and each has marks of its own. A perplexity
under a model of ordinary text says little while they are there. The paper's figures are of text
detokenised by its public code, so the rules do what that does (`tests/golden/detokenizers.json` was
computed with it), corners included: a rule that looks odd is one of its corners.

Every rule takes time linear in the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from blockdiff.data.corpora import Corpus
from blockdiff.errors import InputError

Rule = Callable[[str], str]


def _swap(*pairs: tuple[str, str]) -> list[Rule]:
    """Each text by the one after it, in their order."""

    def rule(old: str, new: str) -> Rule:
        return lambda text: text.replace(old, new)

    return [rule(old, new) for old, new in pairs]


def _sub(*pairs: tuple[str, str]) -> list[Rule]:
    """Each pattern by what comes after it, in their order."""
    return [partial(re.compile(pattern).sub, new) for pattern, new in pairs]


def _strip_within(opening: str, closing: str) -> Rule:
    """No space just inside a pair of marks; a mark goes with the next one that closes."""

    def rule(text: str) -> str:
        found, start = [], 0
        while (begin := text.find(opening, start)) >= 0:
            end = text.find(closing, begin + 1)
            if end < 0:
                break
            found += [text[start : begin + 1], text[begin + 1 : end].strip(), closing]
            start = end + 1
        return "".join([*found, text[start:]])

    return rule


def _before(marks: str) -> list[Rule]:
    """No space before a mark that has one on both sides."""
    return _swap(*((f" {mark} ", f"{mark} ") for mark in marks))


# `@-@` joins what the tokenizer took apart; `= = Title = =` is a heading.
_WIKITEXT = [
    *_swap(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *_before(":;.!?,"),
    *(_strip_within(*pair) for pair in ("()", "[]", "{}", '""', "''")),
    *_swap(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")),
    *_swap((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]
# Lower case, without punctuation; N stands for a number and <unk> for a rare word.
_PTB = [
    *_swap((" 's", "'s"), ("s ' ", "s' "), (" n't", "n't"), (" \n ", "\n"), ("\\/", "/")),
    *_sub((r"(?<= )N(?= )", "1")),
    *_swap(("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")),
]
_LM1B = [
    *_swap(("http : / / ", "http://"), ("https : / / ", "https://")),
    *_sub((r" '(?=\w)", "'"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1.")),
    *_before("?"),
    *_sub((r" \?$", "?")),
    *_before("!"),
    *_sub((r" !$", "!")),
    *_before(",:;"),
    *_swap((" / ", "/")),
    *_sub((r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'")),
    *_sub((r"\( ([^()]+) \)", r"(\1)"), (r"\[ ([^\[\]]+) \]", r"[\1]")),
    *_swap(("$ ", "$"), ("£ ", "£")),
]
_LAMBADA = [*_swap(("“", '"'), ("”", '"')), lambda text: "\n" + text.strip()]

_RULES: dict[str, Sequence[Rule]] = {
    "none": (),
    "wikitext": _WIKITEXT,
    "ptb": _PTB,
    "lm1b": _LM1B,
    "lambada": _LAMBADA,
    "scientific": [*_WIKITEXT, *_LM1B],
}
DETOKENIZERS = tuple(_RULES)


def detokenize(text: str, name: str) -> str:
    """`text` by the rules of a data set of `DETOKENIZERS`, in their order.

    Raises `InputError` for another name.
    """
    if name not in DETOKENIZERS:
        raise InputError(f"no detokenizer {name!r}; choose one of {', '.join(DETOKENIZERS)}")
    for rule in _RULES[name]:
        text = rule(text)
    return text


def detokenized(corpus: Corpus, name: str) -> Corpus:
    """The corpus with each document through `detokenize`; raises `InputError` for no such name."""
    detokenize("", name)
    if name == "none":
        return corpus

    def read(reader: Callable[[], Iterable[str]]) -> Iterator[str]:
        return (detokenize(text, name) for text in reader())

    return replace(corpus, readers=tuple(partial(read, reader) for reader in corpus.readers))
