import json
import logging
import shutil

import huggingface_hub
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from blockdiff.data import tokenizers as own
from blockdiff.data.tokenizers import (
    add_mask_token,
    bos_id,
    eos_id,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
)
from blockdiff.errors import InputError

CORPUS = ["the cat sat on the mat and the dog sat on the log, " * 5, "Ünïcödé 世界 " * 5]
WILD = "héllo \x00\r\n\t 世界 🙂 .  , can 't  \ufeff don't  x"


def word_level(**special) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(CORPUS, 280)


@pytest.fixture
def saved(trained, tmp_path):
    trained.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_the_trained_tokenizer_has_the_size_and_special_tokens_promised(trained):
    assert len(trained) == 280
    assert trained.mask_token == "<|mask|>"
    assert trained.mask_token_id == len(trained) - 1
    end = trained.convert_tokens_to_ids("<|endoftext|>")
    assert trained.bos_token_id == trained.eos_token_id == trained.pad_token_id == end
    assert len(trained.encode("the cat")) < len("the cat")


@pytest.mark.parametrize("text", [WILD, *CORPUS, "", " ", "\n\n", "<|mask|> and <|endoftext|>"])
def test_any_text_survives_the_round_trip(trained, saved, text):
    for tokenizer in (trained, load_tokenizer(saved)):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_a_small_corpus_gives_a_smaller_tokenizer():
    tokenizer = train_tokenizer(["ab"], 5000)
    assert 258 <= len(tokenizer) < 300
    assert tokenizer.mask_token_id == len(tokenizer) - 1
    assert tokenizer.decode(tokenizer.encode(WILD)) == WILD


def test_a_vocabulary_below_the_bytes_is_refused():
    assert len(train_tokenizer(CORPUS, 258)) == 258
    with pytest.raises(InputError, match=r"257.*at least 258"):
        train_tokenizer(CORPUS, 257)


def test_an_error_of_the_corpus_passes_through_training():
    def broken():
        yield "text"
        raise InputError("a.jsonl, line 2: not JSON")

    with pytest.raises(InputError, match="line 2"):
        train_tokenizer(broken(), 300)


def test_loading_keeps_the_ids_and_lifts_the_length_limit(trained, saved, caplog, monkeypatch):
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 8}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # for caplog
    loaded = load_tokenizer(str(saved))
    assert loaded.encode(WILD) == trained.encode(WILD)
    assert loaded.mask_token_id == trained.mask_token_id
    assert not caplog.records
    loaded.model_max_length = 8
    loaded.encode(WILD)
    assert "longer than the specified maximum" in caplog.text  # what the limit would have said


def test_a_mask_token_is_added_only_where_there_is_none():
    without = word_level(eos_token="[SEP]")
    size = len(without)
    assert add_mask_token(without) is without
    assert (without.mask_token, without.mask_token_id, len(without)) == ("<|mask|>", size, size + 1)
    own = add_mask_token(word_level(mask_token="[MASK]"), "<other>")
    assert (own.mask_token_id, len(own)) == (3, size)
    with pytest.raises(InputError, match="'cat'"):
        add_mask_token(word_level(), "cat")


def test_loading_adds_the_mask_token_asked_for(tmp_path):
    word_level().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, "<hole>").mask_token == "<hole>"
    assert load_tokenizer(tmp_path).mask_token_id == 6


def test_bos_and_eos_fall_back():
    assert (bos_id(word_level()), eos_id(word_level())) == (None, None)
    bert = word_level(cls_token="[CLS]", sep_token="[SEP]")
    assert (bos_id(bert), eos_id(bert)) == (1, 2)
    both = word_level(cls_token="[CLS]", sep_token="[SEP]", bos_token="the", eos_token="cat")
    assert (bos_id(both), eos_id(both)) == (4, 5)
    assert bos_id(word_level(eos_token="cat")) == 5
    # An id of 0 is an id.
    assert bos_id(word_level(bos_token="[UNK]", cls_token="[CLS]")) == 0


def test_missing_tokenizers_are_one_clear_line(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    (broken / "tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for source, part in [
        (tmp_path / "gone", "no such folder"),
        ("./gone", "no such folder"),
        ("nobody/nothing", "hub"),
        (broken, "cannot load"),
        (tmp_path / "empty", "cannot load"),
    ]:
        with pytest.raises(InputError) as caught:
            load_tokenizer(source)
        message = str(caught.value)
        assert part in message and str(source) in message and "\n" not in message


def test_code_of_a_tokenizer_is_never_run(saved, tmp_path):
    config = json.loads((saved / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (saved / "tokenizer_config.json").write_text(json.dumps(config))
    proof = tmp_path / "ran"
    (saved / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    try:
        load_tokenizer(saved)
    except InputError as error:
        assert "\n" not in str(error)
    assert not proof.exists()


def test_the_fingerprint_survives_saving_loading_and_calling(trained, saved):
    before = fingerprint(trained)
    assert fingerprint(load_tokenizer(saved)) == before
    assert fingerprint(train_tokenizer(CORPUS, 280)) == before
    trained(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert fingerprint(trained) == before


def test_the_fingerprint_changes_with_all_that_changes_ids(trained, saved):
    prints = [
        fingerprint(trained),
        fingerprint(train_tokenizer(CORPUS, 279)),
        fingerprint(train_tokenizer(CORPUS[:1], 280)),
        fingerprint(word_level()),
        fingerprint(word_level(eos_token="[SEP]")),
        fingerprint(word_level(eos_token="cat")),
        fingerprint(add_mask_token(word_level())),
    ]
    changed = load_tokenizer(saved)
    changed.add_tokens(["the cat"])
    prints.append(fingerprint(changed))
    changed.backend_tokenizer.pre_tokenizer = Whitespace()
    prints.append(fingerprint(changed))
    assert len(set(prints)) == len(prints)


def test_a_long_document_is_learned_in_parts_as_in_one(monkeypatch):
    text = "the cat sat\n\n  on the mat,\nand  the \n dog\nzwölf 🙂\n" * 30
    whole = train_tokenizer([text, "x"], 300)
    monkeypatch.setattr(own, "_LONGEST_PART", 100)
    parts = list(own._in_parts([text, "x"]))
    assert "".join(parts) == text + "x" and max(map(len, parts)) < 200
    learned = train_tokenizer([text, "x"], 300)
    assert learned.get_vocab() == whole.get_vocab()
    assert learned.encode(text) == whole.encode(text)
