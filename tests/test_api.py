"""What a caller is promised: texts as the tokenizer joins them, ids that are words."""

import math

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import blockdiff
from blockdiff.api import continuation
from blockdiff.data.loading import drawable, load
from blockdiff.errors import InputError
from blockdiff.models.hub import save_model
from helpers import tiny_model

WORDS = ["the", "people", "of", "land", "law", "##s"]


def word_piece() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["[UNK]", "[MASK]", "[SEP]", *WORDS])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", mask_token="[MASK]", sep_token="[SEP]"
    )


def sentence_piece() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("<mask>", 0.0), ("</s>", 0.0)]
    pieces += [(f"▁{word.strip('#')}", -1.0) for word in WORDS] + [("s", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>", eos_token="</s>"
    )


@pytest.mark.parametrize("make", [word_piece, sentence_piece])
@pytest.mark.parametrize(
    ("prompt", "whole"),
    [
        ("the people of", "the people of the land"),
        ("", "the land"),
        ("the law", "the laws of the land"),
        ("the people of the law of the people of the law", "the people of the law of the people of"
         " the law of the land"),
    ],
)  # fmt: skip
def test_prompt_and_text_read_as_they_were_written(make, prompt: str, whole: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(whole, add_special_tokens=False)
    first = len(tokenizer.encode(prompt, add_special_tokens=False)) if prompt else 0
    if make is sentence_piece and prompt == "the law":
        ids = [*ids[:2], tokenizer.convert_tokens_to_ids("s"), *ids[3:]]
    assert prompt + continuation(tokenizer, ids[:first], ids[first:]) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == whole


def test_ids_without_a_token_are_never_drawn(tmp_path) -> None:
    """A vocabulary is often padded to a round size: its other ids are no words."""
    tokenizer = word_piece()
    model = tiny_model(vocab_size=64, length=16, mask_token_id=tokenizer.mask_token_id)
    with torch.no_grad():
        model.output.linear.bias[len(tokenizer) :] = 50.0
    save_model(model, tmp_path, tokenizer)
    opened, own = load(tmp_path)
    assert drawable(own, 64).sum() == len(tokenizer)
    for options in ({}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.9}):
        done = blockdiff.generate(opened, "the", tokenizer=own, max_new_tokens=24, **options)
        assert max(done.tokens[0]) < len(tokenizer)


def test_another_tokenizer_is_refused_whatever_its_size(tmp_path) -> None:
    own = word_piece()
    model = tiny_model(vocab_size=64, length=16, mask_token_id=own.mask_token_id)
    save_model(model, tmp_path / "model", own)
    for number, vocabulary in enumerate((WORDS[::-1], [*WORDS, "more"], WORDS[:3])):
        ids = {w: i for i, w in enumerate(["[UNK]", "[MASK]", "[SEP]", *vocabulary])}
        other = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        PreTrainedTokenizerFast(
            tokenizer_object=other, unk_token="[UNK]", mask_token="[MASK]", sep_token="[SEP]"
        ).save_pretrained(tmp_path / str(number))
        with pytest.raises(InputError, match="not the one"):
            load(tmp_path / "model", tokenizer=tmp_path / str(number))
    load(tmp_path / "model", tokenizer=tmp_path / "model")


HOSTILE = [math.inf, -math.inf, math.nan, -1.0, -1e-320, "1", None, True, [1.0]]


@pytest.mark.parametrize("temperature", HOSTILE)
def test_a_temperature_that_is_none_is_refused(temperature: object) -> None:
    model = tiny_model(vocab_size=9, length=16)
    with pytest.raises(InputError, match="`temperature`"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-45, 1e-38, 1e-10, 1e30])
def test_every_temperature_draws_within_the_vocabulary(temperature: float) -> None:
    model = tiny_model(vocab_size=9, length=16)
    for kind in ({}, {"top_p": 0.5}, {"top_k": 2}):
        done = blockdiff.generate(model, [[1]], max_new_tokens=8, temperature=temperature, **kind)
        assert all(0 <= token < 8 for token in done.tokens[0])
    if temperature < 1e-9:
        greedy = blockdiff.generate(model, [[1]], max_new_tokens=8, temperature=0.0)
        cold = blockdiff.generate(model, [[1]], max_new_tokens=8, temperature=temperature)
        assert cold.tokens == greedy.tokens


@pytest.mark.parametrize("block_size", [0, -4, 3, 2.0, "4", True])
def test_a_block_size_that_is_none_is_refused(block_size: object) -> None:
    model = tiny_model(vocab_size=9, length=16)
    with pytest.raises(InputError, match="block"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, block_size=block_size)
    with pytest.raises(InputError, match="block"):
        blockdiff.likelihood(model, torch.ones(1, 16, dtype=torch.int64), block_size=block_size)


def test_a_block_size_the_model_was_not_trained_for_is_said() -> None:
    model = tiny_model(vocab_size=9, length=16)
    with pytest.warns(UserWarning, match="trained with block size 4, not 8"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, block_size=8)


@pytest.mark.parametrize("prompt", ["caf\udce9", "\ud800", "a\udfffb"])
def test_a_prompt_that_is_no_text_is_refused(prompt: str) -> None:
    model, tokenizer = blockdiff.load("starter")
    with pytest.raises(InputError, match="UTF-8"):
        blockdiff.generate(model, prompt, tokenizer=tokenizer, max_new_tokens=1)
