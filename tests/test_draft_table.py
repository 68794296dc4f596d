"""A table of n-grams beside a model: counted, stored, read, and drafted with."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import blockdiff
from blockdiff import cli
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.models.hub import save_model
from blockdiff.models.ngrams import FILE, Table
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.options import SamplingOptions
from helpers import tiny_model

TEXTS = [f"The rose number {i % 7} is a rose, and a rose is a flower of {i}." for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(TEXTS, 300)
    model = tiny_model(
        vocab_size=len(tokenizer), length=16, causal=True, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, mask_token_id=tokenizer.mask_token_id,
    )  # fmt: skip
    save_model(model, tmp_path / "model", tokenizer)
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS))
    return tmp_path


def test_the_command_counts_the_text(folder: Path, capsys) -> None:
    text = str(folder / "text.txt")
    cli.main(["draft-table", str(folder / "model"), text, "--part", "all"])
    assert "different triples of" in capsys.readouterr().out
    model, tokenizer = blockdiff.load(folder / "model")
    ids = tokenizer.encode("\n\n".join(TEXTS), add_special_tokens=False)
    found = model.draft_table
    counted = Counter()
    for document in blockdiff.data.corpora.load_corpus(text):
        row = [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
        counted.update(zip(row, row[1:], row[2:], strict=False))
    size = model.config.vocab_size
    stored = {
        (int(key % size), int(key // size), int(c)): int(n)
        for key, c, n in zip(found.key, found.following, found.count, strict=True)
    }
    assert stored == dict(counted) and len(ids) > 100
    cli.main(["draft-table", str(folder / "model"), text, "--part", "all", "--min-count", "3"])
    fewer = blockdiff.load(folder / "model")[0].draft_table
    assert fewer.count.tolist() == [int(n) for n in found.count if n > 2]
    # It drafts what the text says: the table's favourite is tried first.
    wish = SamplingOptions(max_new_tokens=8, stop="none", sampler="verified", temperature=0.0)
    plain = SamplingOptions(max_new_tokens=8, stop="none", temperature=0.0)
    assert (
        generate_tokens(model, [ids[:5]], wish).tokens
        == generate_tokens(model, [ids[:5]], plain).tokens
    )


def test_a_model_that_repeats_the_text_is_drafted_well(folder: Path) -> None:
    """One whose tokens follow from the two before takes a table's drafts nearly all."""
    model, _ = blockdiff.load(folder / "model")
    period = np.array([5, 6, 7, 8, 9, 10] * 20)

    def decode(x, positions, cache, at, **unread):
        cache.stage(0, *(torch.zeros(len(x), 2, x.shape[1], 8),) * 2)
        cache.stage(1, *(torch.zeros(len(x), 2, x.shape[1], 8),) * 2)
        after = torch.where(x < 10, x + 1, 5).flatten()[at]
        return 50.0 * torch.nn.functional.one_hot(after, model.config.vocab_size).float()

    model.decode = decode
    model.draft_table = Table.of(period, model.config.vocab_size)
    wish = SamplingOptions(max_new_tokens=40, stop="none", sampler="verified", drafts=4)
    done = generate_tokens(model, [[5, 6]], wish)
    assert done.tokens[0] == (period[2:42]).tolist()
    assert done.nfe[0] < 20


@pytest.mark.parametrize(
    "tensors",
    [
        {"key": np.array([3, 1]), "following": np.array([1, 1]), "count": np.array([1, 1])},
        {"key": np.array([1]), "following": np.array([999]), "count": np.array([1])},
        {"key": np.array([1])},
    ],
)
def test_a_file_that_is_no_table(folder: Path, tensors) -> None:
    save_file(tensors, folder / "model" / FILE)
    with pytest.raises(InputError, match=FILE):
        blockdiff.load(folder / "model")


@pytest.mark.parametrize(
    "words, says",
    [
        (["starter", "pydoc"], "is no folder"),
        (["MODEL", "nowhere.txt"], "nowhere.txt"),
        (["MODEL", "TEXT", "--part", "none"], "--part"),
        (["MODEL", "TEXT", "--min-count", "0"], "--min-count"),
        (["MODEL", "TEXT", "--part", "all", "--min-count", "999"], "no three tokens in a row 999"),
    ],
)
def test_bad_input(folder: Path, words, says, capsys) -> None:
    places = {"MODEL": str(folder / "model"), "TEXT": str(folder / "text.txt")}
    with pytest.raises(SystemExit) as stop:
        cli.main(["draft-table", *(places.get(word, word) for word in words)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and says in printed.err and printed.err.count("\n") == 1
    assert not (folder / "model" / FILE).exists()
