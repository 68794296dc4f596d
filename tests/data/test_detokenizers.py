"""The marks of benchmarks' files, undone; what is ordinary text stays as it is."""

import json
from pathlib import Path

import pytest

from blockdiff.data.corpora import load_corpus
from blockdiff.data.detokenizers import DETOKENIZERS, detokenize, detokenized
from blockdiff.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "detokenizers.json"


@pytest.mark.parametrize("name", [name for name in DETOKENIZERS if name != "none"])
def test_the_rules_do_what_the_papers_public_code_does(name: str) -> None:
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(cases) > 70
    for case in cases:
        assert detokenize(case["text"], name) == case[name], case["text"]
    assert any(case[name] != case["text"] for case in cases)


@pytest.mark.parametrize(
    ("name", "marked", "plain"),
    [
        ("wikitext", " = = Early life = = \n", " == Early life ==\n"),
        ("wikitext", "a well @-@ known 1 @,@ 000 and 2 @.@ 5", "a well-known 1,000 and 2.5"),
        ("ptb", "the company 's and\\/or N N does n't", "the company's and/or 1 1 doesn't"),
        ("lm1b", "at http : / / x.org ( now ) , he said .", "at http://x.org (now), he said."),
        ("lambada", "“Yes,” she said ", '\n"Yes," she said'),
        (
            "scientific",
            "we show @xmath0 ( see fig . 1 ) , so .",
            "we show @xmath0 (see fig. 1), so.",
        ),
        ("none", " ( as it is ) ", " ( as it is ) "),
    ],
)
def test_marks_are_undone(name: str, marked: str, plain: str) -> None:
    assert detokenize(marked, name) == plain


# What made a rule with two adjoining ways to eat a space take the square or cube of its length.
PIECES = [
    " ",
    '"',
    '" ',
    "' ",
    "( ",
    "[ ",
    "{ ",
    "a ",
    " .",
    " ?",
    "(",
    "\n",
    "s '",
    "N ",
    "=",
    "x",
]


@pytest.mark.parametrize("name", DETOKENIZERS)
def test_a_long_hostile_text_ends(name: str) -> None:
    """60,000 characters of one piece: the cubic rule there was took minutes for 20,000."""
    for piece in PIECES:
        for text in ('" ' + piece * (60_000 // len(piece)), piece * 10_000 + ' "'):
            assert len(detokenize(text, name)) <= len(text) + 1


def test_a_corpus_is_read_through_it_again_and_again(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"text": "one , two"}), encoding="utf-8")
    corpus = detokenized(load_corpus(path), "lm1b")
    assert list(corpus) == list(corpus) == ["one, two"]
    assert detokenized(load_corpus(path), "none").readers
    with pytest.raises(InputError, match="choose one of none, wikitext"):
        detokenized(load_corpus(path), "wiki")
