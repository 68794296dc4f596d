"""What is said of generated texts: figures by hand; a judge knows text from its shuffle."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from blockdiff import cli
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation.judge import load_judge, windows
from blockdiff.evaluation.samples import (
    distinct,
    divergence,
    ngrams,
    read_samples,
    sample_quality,
    shuffled,
    token_entropy,
)
from blockdiff.models.hub import save_model
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train
from helpers import TEXTS, save_gpt2, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory):
    """A random network of transformers' own, as a folder."""
    return save_gpt2(tmp_path_factory.mktemp("gpt2"), tokenizer)


def test_figures_by_hand():
    assert token_entropy([1, 1, 2, 2]) == pytest.approx(math.log(2))
    assert ngrams([[1, 2, 1, 2], [2, 1]], 2) == {(1, 2): 2, (2, 1): 2}
    assert distinct([[1, 2, 1, 2], [2, 1]], 2) == 0.5
    assert divergence([[1, 2]], [[1, 2]], 1) == 0
    assert divergence([[1, 1]], [[2, 2, 2]], 1) == pytest.approx(math.log(2))
    p, q, m = (0.5, 0.5), (0.75, 0.25), (0.625, 0.375)
    by_hand = sum(0.5 * sum(a * math.log(a / c) for a, c in zip(x, m, strict=True)) for x in (p, q))
    assert divergence([[1, 2, 1, 2]], [[1, 1, 1, 2, 7]], 1) == pytest.approx(by_hand)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 12, 13, 30])
def test_windows_score_each_token_once(tokens):
    scored = []
    for begin, context in windows(tokens, 8):
        scored += range(begin + context, min(begin + 8, tokens))
        assert begin == 0 or context == 4, "half a window of context"
    assert scored == list(range(1, tokens))


def test_a_judge_scores_as_one_pass_by_hand(gpt2, tokenizer):
    """Texts of several lengths, in a batch, against transformers' own loss of each."""
    judge = load_judge(gpt2)
    assert judge.window == 64
    texts = [TEXTS[0][:11], TEXTS[5], TEXTS[9][:30]]
    nats, count = judge.nats(texts)
    network = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    for text, found, scored in zip(texts, nats, count, strict=True):
        ids = [tokenizer.bos_token_id or tokenizer.eos_token_id]
        ids += tokenizer.encode(text, add_special_tokens=False)
        x = torch.tensor([ids])
        with torch.no_grad():
            loss = network(input_ids=x, labels=x).loss
        assert scored == len(ids) - 1
        assert found.item() == pytest.approx(loss.item() * (len(ids) - 1), rel=1e-5)


def test_windows_of_a_long_text(gpt2, tokenizer):
    judge = load_judge(gpt2, window=16)
    text = " ".join(TEXTS[:2])
    ids = [judge.first, *judge.encode(text)]
    network = GPT2LMHeadModel.from_pretrained(gpt2).eval()
    by_hand = 0.0
    for begin, context in windows(len(ids), 16):
        part = torch.tensor([ids[begin : begin + 16]])
        with torch.no_grad():
            log_p = network(input_ids=part).logits[0].log_softmax(-1)
        by_hand -= sum(log_p[i - 1, part[0, i]].item() for i in range(context, part.shape[1]))
    nats, count = judge.nats([text])
    assert count.item() == len(ids) - 1 > 32
    assert nats.item() == pytest.approx(by_hand, rel=1e-5)


def test_a_judge_knows_text_from_its_shuffle(tmp_path, tokenizer, monkeypatch, capsys):
    """An AR model trained for seconds, through the command, on real and on shuffled words."""
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS), encoding="utf-8")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    train(
        TrainConfig(
            out=str(tmp_path / "ar"), data=str(corpus), tokenizer=str(tmp_path / "tokenizer"),
            objective="ar", length=32, steps=60, batch_size=8, lr=3e-3, warmup=5, dropout=0.0,
            ema=0.0, eval_windows=2, report_to="none", validation_data=str(corpus),
        ),
        progress=False,
    )  # fmt: skip
    samples = tmp_path / "samples.json"
    record = {
        "texts": shuffled(TEXTS[:20], seed=5), "nfe": [4] * 20, "tokens": [12] * 20,
        "seconds": 2.0, "finish": ["length"] * 20, "rejection_rate": 0.0,
    }  # fmt: skip
    samples.write_text(json.dumps(record), encoding="utf-8")
    command = ["evaluate-samples", str(samples), "--judge", str(tmp_path / "ar"), "--reference",
               str(corpus), "--words", "13"]  # fmt: skip
    cli.main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    real, mixed = found["real text"], found["real, shuffled"]
    apart = 4 * (real["perplexity"]["stderr"] + mixed["perplexity"]["stderr"])
    assert real["perplexity"]["value"] + apart < mixed["perplexity"]["value"]
    assert real["divergence"]["2"]["value"] < mixed["divergence"]["2"]["value"]
    assert found["samples"]["perplexity"]["value"] > 1.5 * real["perplexity"]["value"]
    assert found["samples"]["cost"] == {
        "nfe": 4, "tokens_per_nfe": 3, "tokens_per_second": 120
    }  # fmt: skip
    cli.main(command)
    assert "generative perplexity" in capsys.readouterr().out


def test_dull_text_is_seen_where_perplexity_is_not(tokenizer):
    dull = sample_quality(["the the the the the the"] * 8, tokenizer.encode)
    lively = sample_quality(TEXTS[:8], tokenizer.encode)
    assert dull.entropy.value < 0.5 * lively.entropy.value
    assert dull.distinct[2].value < 0.3 * lively.distinct[2].value
    assert dull.perplexity is None and dull.divergence is None and dull.rejection_rate is None


def test_bad_input(tmp_path, tokenizer):
    tiny = tmp_path / "bd"
    save_model(
        tiny_model(vocab_size=len(tokenizer), mask_token_id=len(tokenizer) - 1), tiny, tokenizer
    )
    for source in (tiny, tmp_path / "nothing"):
        with pytest.raises(InputError):
            load_judge(source)
    broken = tmp_path / "broken.json"
    broken.write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="generate --json"):
        read_samples(str(broken))
    with pytest.raises(SystemExit):
        cli.main(["evaluate-samples", str(broken)])


@pytest.mark.parametrize(
    "texts", ["null", "1", "{}", '"a text"', "[null]", "[1]", '[["a"]]', "[]", "[" * 9999]
)
def test_samples_that_are_no_texts_are_refused(tmp_path: Path, texts: str) -> None:
    path = tmp_path / "samples.json"
    path.write_text(f'{{"texts": {texts}}}')
    with pytest.raises(InputError, match=r"samples\.json"):
        read_samples(str(path))


def test_a_text_without_tokens_has_no_figures() -> None:
    found = sample_quality([""], lambda text: [])
    assert math.isnan(found.entropy.value) and found.length_max == 0
    both = sample_quality(["", "a b"], lambda text: [ord(c) for c in text])
    assert both.entropy.value == pytest.approx(math.log(3))


@pytest.mark.parametrize("window", [1, 0, -5, 2.5])
def test_a_judge_that_cannot_predict_is_refused(window: float) -> None:
    with pytest.raises(InputError, match="`window`"):
        load_judge("starter", window)  # type: ignore[arg-type]
