"""The marks of benchmarks' files, undone; what is ordinary text stays as it is."""

import json
from pathlib import Path

import pytest

from blockdiff.data.corpora import load_corpus
from blockdiff.data.detokenizers import DETOKENIZERS, detokenize, detokenized
from blockdiff.errors import InputError

ORDINARY = (
    'He said "yes" and "no" to "it". He said, "Don\'t go: it\'s 5.3% (or $1,000) - the boys\' own; '
    "isn't it?\" Yes!\n\nA new line."
)


@pytest.mark.parametrize(
    ("name", "marked", "plain"),
    [
        ("wikitext", " = = Early life = = \n", "== Early life =="),
        ("wikitext", "a well @-@ known 1 @,@ 000 and 2 @.@ 5", "a well-known 1,000 and 2.5"),
        ("wikitext", 'He said , " no . " ( twice ) ; the boys \' own .',
         'He said, "no." (twice); the boys\' own.'),
        ("wikitext", "it 's $ 5 % more", "it's $5% more"),
        ("ptb", "<unk> n. v. has a stake of N N worth $ N", "? n. v. has a stake of 1 1 worth $1"),
        ("ptb", "the company 's and\\/or does n't we 'll", "the company's and/or doesn't we'll"),
        ("lm1b", "It does n't cost $ 5 , he said ( at http : / / x.org ) .",
         "It doesn't cost $5, he said (at http://x.org)."),
        ("lambada", "“Yes,” she’d said", '"Yes," she\'d said'),
        ("scientific", "we show @xmath0 ( see fig . 1 ) , and it 's so .",
         "we show @xmath0 (see fig. 1), and it's so."),
        ("none", " ( as it is ) ", " ( as it is ) "),
    ],
)  # fmt: skip
def test_marks_are_undone(name: str, marked: str, plain: str) -> None:
    assert detokenize(marked, name) == plain


@pytest.mark.parametrize("name", [name for name in DETOKENIZERS if name != "none"])
def test_ordinary_text_stays(name: str) -> None:
    assert detokenize(ORDINARY, name) == ORDINARY
    for marked in ('" a ( b ) c . "', "it 's @-@ N <unk>", "s ' = = = ="):
        once = detokenize(marked, name)
        assert detokenize(once, name) == once


def test_a_corpus_is_read_through_it_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "one , two"}), encoding="utf-8")
    corpus = detokenized(load_corpus(path), "lm1b")
    assert list(corpus) == list(corpus) == ["one, two"]
    assert detokenized(load_corpus(path), "none").readers
    with pytest.raises(InputError, match="choose one of none, wikitext"):
        detokenized(load_corpus(path), "wiki")


HOSTILE = ['" ' + " " * 200_000 + "x", '"' * 200_000, '" ' * 100_000, "( " * 100_000,
           " )x" * 70_000, " " * 200_000, "$ " * 100_000, " @" * 100_000, "= " * 100_000,
           '" a' + " b" * 100_000, "' " * 100_000, "http : " * 30_000]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in DETOKENIZERS if name != "none"])
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:6]))
def test_hostile_texts_of_200_000_characters_end(name, text):
    """A rule that tried every start of a run of spaces would take hours, not tenths of a second."""
    assert len(detokenize(text, name)) <= len(text)
