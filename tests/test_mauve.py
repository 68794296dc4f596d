"""MAUVE and perplexity over temperatures: what is known beforehand, and by hand."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

import blockdiff
from blockdiff import cli
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation.judge import load_judge
from blockdiff.evaluation.mauve import NOTE, area, mauve, require_mauve
from blockdiff.evaluation.samples import sample_quality
from blockdiff.models.hub import save_model
from blockdiff.plots import temperature_plot
from helpers import TEXTS, save_gpt2, tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A random GPT-2, an AR and a block diffusion model of ours, and a corpus."""
    home = tmp_path_factory.mktemp("mauve")
    save_gpt2(home / "gpt2", tokenizer)
    ids = {name: getattr(tokenizer, name) for name in (
        "mask_token_id", "bos_token_id", "eos_token_id"
    )}  # fmt: skip
    settings = {"vocab_size": len(tokenizer), "length": 64, **ids}
    ar = {"objective": "ar", "causal": True, "block_size": 1}
    save_model(tiny_model(**settings, **ar), home / "ar", tokenizer)
    save_model(tiny_model(**settings, block_size=4), home / "four", tokenizer)
    lines = (json.dumps({"text": text}) + "\n" for text in TEXTS)
    (home / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    return home


def clouds(n, apart, seed=0):
    draw = np.random.default_rng(seed)
    p, q = draw.normal(size=(2, n, 8))
    return p, q + apart


def test_the_area_is_that_of_mauve_text():
    compute = pytest.importorskip("mauve").compute_mauve
    for apart in (0, 0.2, 0.5, 3):
        found = compute(*clouds(80, apart), verbose=False)
        assert area(found.p_hist, found.q_hist) == pytest.approx(found.mauve, abs=1e-6)
    draw = np.random.default_rng(1)
    p, q = draw.dirichlet(np.ones(6), 2)
    assert area(p, q) == pytest.approx(area(q, p)) and area(p, p) == pytest.approx(1)


def test_the_same_texts_are_near_1_and_others_near_0():
    pytest.importorskip("mauve")
    p, q = clouds(100, 0)
    same = mauve(p, p)
    assert same.value > 0.999 and same.note == NOTE and same.texts == 100
    alike, apart = mauve(p, q), mauve(p, q + 20)
    # Two sets of one distribution: below 1 by the noise of a histogram, which the interval undoes.
    assert 0.85 < alike.value < 1 and alike.high > 0.97
    assert apart.value < 0.02 and apart.high < 0.03
    assert alike.low <= alike.value and apart.low <= apart.value <= apart.high
    assert mauve(p, q, seed=1) == mauve(p, q, seed=1)
    few, many = (mauve(*clouds(n, 0.4)) for n in (40, 400))
    assert many.high - many.low < few.high - few.low, "more texts tell more"
    with pytest.raises(InputError, match="9 texts"):
        mauve(p[:9], q)


def test_features_are_the_last_hidden_state_of_the_last_token(folders, tokenizer):
    """Texts of several lengths in a batch, against each alone; our head makes logits of them."""
    texts = [TEXTS[0][:11], TEXTS[5], TEXTS[9][:30], " ".join(TEXTS[:9])]
    judge = load_judge(folders / "gpt2", window=32)
    found = judge.features(texts)
    network = GPT2LMHeadModel.from_pretrained(folders / "gpt2").eval()
    for text, own in zip(texts, found, strict=True):
        ids = [judge.first, *tokenizer.encode(text)][:32]
        with torch.no_grad():
            states = network(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(own, states[-1][0, -1], atol=1e-5, rtol=1e-4)
    judge, (model, _) = load_judge(folders / "ar"), blockdiff.load(folders / "ar", device="cpu")
    for text, own in zip(texts, judge.features(texts), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)][:64]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
            by_head = model.get_output_embeddings()(own[None])[0]
        torch.testing.assert_close(by_head, logits, atol=1e-4, rtol=1e-4)


def test_the_command_says_what_mauve_may_be_compared_with(folders, tmp_path, capsys):
    pytest.importorskip("mauve")
    samples = tmp_path / "samples.json"
    samples.write_text(json.dumps({"texts": ["the the the"] * 20}), encoding="utf-8")
    command = ["evaluate-samples", str(samples), "--judge", str(folders / "gpt2"), "--reference",
               str(folders / "corpus.jsonl"), "--words", "13", "--mauve"]  # fmt: skip
    cli.main([*command, "--json"])
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "MAUVE of 20 texts is rough" in told.err and "clustering" not in told.err
    assert found["samples"]["mauve"]["note"] == NOTE
    assert found["samples"]["mauve"]["features"] == str(folders / "gpt2")
    assert found["samples"]["mauve"]["value"] < 0.05 < found["real text"]["mauve"]["value"]
    cli.main(command)
    assert f"MAUVE: {NOTE}" in capsys.readouterr().out


def test_perplexity_over_temperatures(folders, tmp_path, capsys, tokenizer):
    picture = tmp_path / "frontier.png"
    command = ["evaluate-samples", str(folders / "four"), "--temperatures", "1,0.3", "--judge",
               str(folders / "gpt2"), "--number", "12", "--max-new-tokens", "12", "--reference",
               str(folders / "corpus.jsonl"), "--words", "13", "--precision", "float32", "--seed",
               "3", "--device", "cpu"]  # fmt: skip
    cli.main([*command, "--json", "--plot", str(picture)])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["T = 0.3", "T = 1", "real text"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    model, words = blockdiff.load(folders / "four", device="cpu")
    judge = load_judge(folders / "gpt2", device="cpu")
    for temperature in (0.3, 1.0):
        done = blockdiff.generate(
            model, tokenizer=words, samples=12, max_new_tokens=12, temperature=temperature, seed=3
        )
        by_hand = sample_quality(done.texts, judge.encode, judge=judge)
        own = found[f"T = {temperature:g}"]
        assert own["perplexity"]["value"] == pytest.approx(by_hand.perplexity.value)
        assert own["entropy"]["value"] == pytest.approx(by_hand.entropy.value)
        assert own["cost"]["nfe"] == pytest.approx(np.mean(done.nfe))
    axes = temperature_plot(found).axes[0]
    assert {text.get_text() for text in axes.texts} == set(found)
    curve, point = (container.lines[0] for container in axes.containers)
    assert list(curve.get_xdata()) == [found[t]["entropy"]["value"] for t in ("T = 0.3", "T = 1")]
    assert list(point.get_ydata()) == [found["real text"]["perplexity"]["value"]]
    cli.main(command)
    assert "T = 0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mauve"], "give both"),
        (["--temperatures", "hot"], "--temperatures is 'hot'"),
        (["--temperatures", ","], "--temperatures is ','"),
        (["--temperatures", "1,-1"], "it must be at least 0"),
        (["--temperatures", "1", "--temperature", "1"], "--temperature is one of several"),
        (["--temperatures", "1"], "name one"),
        (["--temperatures", "1", "--number", "0"], "--number is 0"),
        (["--top-p", "0.9"], "--top-p says how a model writes"),
    ],
)
def test_bad_input(folders, capsys, words, message):
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate-samples", str(folders / "four"), *words])
    told = capsys.readouterr().err
    assert left.value.code == 2 and message in told and told.count("\n") == 1


def test_without_the_extra_it_is_named(folders, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(InputError, match=r"pip install 'blockdiff\[eval\]'"):
        require_mauve()
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate-samples", str(folders / "corpus.jsonl"), "--judge", "x", "--reference",
                  "y", "--mauve"])  # fmt: skip
    told = capsys.readouterr().err
    assert left.value.code == 2 and "blockdiff[eval]" in told and told.count("\n") == 1
