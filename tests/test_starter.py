"""The model that comes with the package: small, whole, and it writes something like English."""

import json
import math
import random
import re
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import blockdiff
from blockdiff import cli
from blockdiff.starter import packaged

FOLDER = Path(str(packaged("starter")))
# Lincoln at Gettysburg: public domain, and no part of what the starter was trained on.
ADDRESS = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created equal. Now "
    "we are engaged in a great civil war, testing whether that nation, or any nation so conceived "
    "and so dedicated, can long endure. We are met on a great battle-field of that war. We have "
    "come to dedicate a portion of that field, as a final resting place for those who here gave "
    "their lives that that nation might live. It is altogether fitting and proper that we should "
    "do this. But, in a larger sense, we can not dedicate, we can not consecrate, we can not "
    "hallow this ground. The brave men, living and dead, who struggled here, have consecrated it, "
    "far above our poor power to add or detract."
)
# The commonest of English words; about four words in ten of any English text.
COMMON = frozenset(re.findall(
    r"\w+", "the of and to in a that is was it for be as with by on not which have our his this "
    "are from has at or their will but all been we i",
))  # fmt: skip


def test_it_is_small_and_complete() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds == {torch.bfloat16}
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 12e6
    model, tokenizer = blockdiff.load("starter")
    assert model.config.block_size == 4 and model.config.kind == "bd3lm"
    assert model.config.block_sizes == (1, 4, 8, 16) and model.config.prediction == "shift"
    assert len(tokenizer) == model.config.vocab_size and model.chain is not None
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for part in ("license:", "State of the Union", "Moby-Dick", "What it is not"):
        assert part in card


def test_it_is_part_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["blockdiff"]
    package = Path(blockdiff.__file__).parent
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "README.md"):  # fmt: skip
        assert FOLDER / name in shipped


def test_it_writes_recognisable_english(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the words in 1,000 tokens about as many are common ones as in English."""
    cli.main(["generate", "starter", "--prompt", "The people of the United States", "--samples",
              "8", "--max-new-tokens", "128", "--seed", "0", "--json"])  # fmt: skip
    texts = json.loads(capsys.readouterr().out)["texts"]
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    share = sum(word in COMMON for word in words) / len(words)
    assert len(words) > 400 and 0.25 < share < 0.6


def test_it_knows_english_from_its_words_in_disorder() -> None:
    model, tokenizer = blockdiff.load("starter")
    words = ADDRESS.split()
    random.Random(0).shuffle(words)

    def bits_per_byte(text: str) -> float:
        tokens = tokenizer.encode(text, add_special_tokens=False)[:160]
        found = blockdiff.likelihood(model, torch.tensor([tokens]), estimator="enumerate")
        # The first token is given, not predicted.
        size = len(tokenizer.decode(tokens[1:]).encode())
        return float(found.nats.sum()) / math.log(2) / size

    own, disorder = bits_per_byte(ADDRESS), bits_per_byte(" ".join(words))
    assert own < 2.0 and own < disorder - 0.5


def test_a_folder_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged("elsewhere") == "elsewhere"
    monkeypatch.chdir(tmp_path)
    assert packaged("starter") == FOLDER
    (tmp_path / "starter").mkdir()
    assert packaged("starter") == "starter"
