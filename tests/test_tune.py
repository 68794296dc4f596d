"""tune: what is tried, how it is judged, what is chosen, and where the choice is written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import blockdiff
from blockdiff import cli
from blockdiff.data.corpora import split_documents
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.evaluation import tuning
from blockdiff.evaluation.choosing import decide, own_folder, summary, texts_figures, tuning_table
from blockdiff.evaluation.judge import load_judge
from blockdiff.evaluation.options import TuneOptions
from blockdiff.evaluation.statistics import mean_error, paired_error, ratio_error
from blockdiff.evaluation.tuning import (
    beginnings,
    grid,
    has_single_blocks,
    tune,
)
from blockdiff.models.hub import load_model, save_model
from blockdiff.plots import frontier_plot
from blockdiff.registry import ORDERS
from blockdiff.sampling.defaults import store_options
from blockdiff.sampling.options import SamplingOptions
from helpers import tiny_model

TEXTS = [
    f"the {a} {b} walks over the {c} and then it sees the {a} {b} again, as it did before"
    for a in ("old", "small", "red") for b in ("dog", "cat", "man", "bird")
    for c in ("hill", "field")
]  # fmt: skip
SMALL = {"samples": 4, "prompt_tokens": 3, "max_new_tokens": 8, "repeats": 1,
         "precision": "float32", "orders": "confidence,threshold"}  # fmt: skip
FLAGS = [word for name, value in SMALL.items()
         for word in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def made(tokenizer, **settings):
    ids = {name: getattr(tokenizer, name)
           for name in ("bos_token_id", "eos_token_id", "mask_token_id")}  # fmt: skip
    sizes = {"block_size": 4, "block_sizes": [1, 4]}
    return tiny_model(len(tokenizer), 32, **(sizes | ids | settings))


@pytest.fixture
def folder(tokenizer, tmp_path):
    save_model(made(tokenizer), tmp_path / "model", tokenizer)
    return tmp_path / "model"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def wish(data="x", **options):
    return TuneOptions(data=data, **{**SMALL, **options})


def make(asked):
    return lambda point, **others: tuning._options({}, asked, point, **others)


# the grid


def points_of(asked, **conventions):
    config = made(train_tokenizer(TEXTS, 300), **conventions).config
    found = grid(config, asked, make(asked))
    return [tuple(point.values()) for point in found]


def test_the_grid_is_the_registrys():
    """The reference, then each order's own values; at L' = 1 there is one, and what drafts."""
    everything = points_of(wish(orders=None))
    assert everything[:2] == [("first_hitting", 4, 1.0), ("first_hitting", 1, 1.0)]
    assert {point[1] for point in everything if len(point) == 3} == {1, 4}
    rest = everything[2:]
    drafted = [("verified", k, 1, 1.0) for k in (2, 3, 4)]
    assert [point for point in rest if point[2] == 1] == drafted
    assert all(point[-2:] == (4, 1.0) for point in rest if point not in drafted)
    for name in ORDERS:
        values = {point[1] for point in rest if point[0] == name}
        axes = list((ORDERS[name].tunes or {}).values())
        assert values == set(axes[0] if axes else ()), name
    assert all(SamplingOptions(**{k: v}) for name in ORDERS
               for k, vs in (ORDERS[name].tunes or {}).items() for v in vs)  # fmt: skip
    assert points_of(wish(orders=None), block_size=2, block_sizes=None).count(
        ("confidence", 4, 2, 1.0)
    ) == 0  # fmt: skip
    assert points_of(wish(orders=None), causal=True, block_sizes=None) == [
        ("first_hitting", 1, 1.0), *drafted,
    ]  # fmt: skip


def test_lists_take_the_place_of_an_orders_values():
    assert points_of(wish(thresholds="0.8,0.7", block_sizes="4")) == [
        ("first_hitting", 4, 1.0), ("confidence", 2, 4, 1.0), ("confidence", 4, 4, 1.0),
        ("threshold", 0.8, 4, 1.0), ("threshold", 0.7, 4, 1.0),
    ]  # fmt: skip
    asked = wish(orders="ancestral,confidence", steps="1,3", block_sizes="2", temperatures="0,1")
    assert points_of(asked) == [
        ("first_hitting", 2, 0.0), ("first_hitting", 2, 1.0),
        ("ancestral", 1, 2, 0.0), ("ancestral", 3, 2, 0.0),
        ("ancestral", 1, 2, 1.0), ("ancestral", 3, 2, 1.0),
        ("confidence", 1, 2, 0.0), ("confidence", 3, 2, 0.0),
        ("confidence", 1, 2, 1.0), ("confidence", 3, 2, 1.0),
    ]  # fmt: skip
    editing = points_of(wish(orders="editing", thresholds="0.5", block_sizes="4"))
    assert editing[1:] == [("editing", 0.5, 4, 1.0)]


def test_an_order_of_ones_own_is_in_it(monkeypatch):
    class Pairs(blockdiff.Order):
        name, reads, tunes = "pairs", ("tokens_per_step",), {"tokens_per_step": (2, 3)}

        def choose(self, logits, wanted, rows):
            return None, rows.draw(logits, wanted)

    monkeypatch.setattr(ORDERS, "_objects", dict(ORDERS._objects))
    ORDERS.register(Pairs())
    found = points_of(wish(orders=None, block_sizes="4"))
    assert [point for point in found if point[0] == "pairs"] == [
        ("pairs", 2, 4, 1.0), ("pairs", 3, 4, 1.0)
    ]  # fmt: skip


def test_what_the_model_refuses_is_left_out_unless_it_was_named(tokenizer, monkeypatch):
    """analytic samples SEDD models only."""
    model = made(tokenizer)
    point = {"sampler": "analytic", "steps": 2, "block_size": 4, "temperature": 1.0}
    for orders, left in ((None, 0), ("threshold", 0), ("analytic", 1)):
        asked, points = wish(orders=orders), [dict(point)]
        if left:
            with pytest.raises(InputError, match="analytic"):
                tuning._drop_refused(points, model, [1], asked, make(asked))
        else:
            tuning._drop_refused(points, model, [1], asked, make(asked))
            assert not points


# the text


def test_beginnings_are_of_documents_and_then_of_pieces(tokenizer):
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:3]]
    assert min(map(len, ids)) >= 13
    asked = wish(samples=2)
    prompts, real = beginnings(TEXTS[:3], tokenizer, tokenizer.mask_token_id, asked)
    whole = [tokenizer.bos_token_id]
    for prompt, rest in zip(prompts, real, strict=True):
        assert any(prompt == whole + one[:3] and rest == one[3:11] for one in ids)
    assert prompts[0] != prompts[1]
    # Two documents give more texts than two: later pieces, without BOS, whole ones first.
    prompts, real = beginnings(TEXTS[:2], tokenizer, tokenizer.mask_token_id, wish(samples=9))
    pieces = [(whole * (at == 0), one[at : at + 11]) for one in ids[:2]
              for at in range(0, len(one) - 3, 11)]  # fmt: skip
    assert len(pieces) > 2 and sorted(prompts) == sorted(a + b[:3] for a, b in pieces)
    assert sorted(real) == sorted(b[3:] for _, b in pieces)
    lengths = [len(rest) for rest in real]
    assert lengths[0] == 8 and lengths == sorted(lengths, reverse=True)
    with pytest.raises(InputError, match="0 beginnings of 900 tokens"):
        beginnings(TEXTS, tokenizer, tokenizer.mask_token_id, wish(prompt_tokens=900))


def test_the_held_out_part_is_continued(folder, corpus, tokenizer, monkeypatch):
    seen = []

    def noted(documents, *rest):
        seen.extend(documents)
        return beginnings(seen, *rest)

    monkeypatch.setattr(tuning, "beginnings", noted)
    asked = wish(corpus, part="validation", validation_fraction=0.4, split_seed=5,
                 orders="threshold", thresholds="0.5", block_sizes="4")  # fmt: skip
    record = tune(folder, asked, device="cpu")
    assert seen == list(split_documents(TEXTS, 0.4, 5)[1]) and 0 < len(seen) < len(TEXTS)
    assert record["settings"]["part"] == "validation"


# the judge


def test_the_model_itself_judges_as_its_logits_say(tokenizer):
    """L' = 1 of a mixture, against plain passes: a token's mask behind its clean prefix."""
    model = made(tokenizer)
    prompts, new = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]]
    judge, name = tuning._judging(model, tokenizer, wish(), "cpu")
    assert name == "the model itself, L' = 1"
    nats, tokens = judge(prompts, new)
    mask, expected = model.config.mask_token_id, []
    for prompt, text in zip(prompts, new, strict=True):
        total = 0.0
        for i, token in enumerate(text):
            x_0 = torch.tensor([[*prompt, *text[: i + 1]]])
            x_t = torch.full_like(x_0, mask)
            layout = model.config.layout_of(x_0.shape[1], 1)
            with torch.no_grad():
                logits = model(x_t, x_0=x_0, layout=layout).logits[0, -1].float()
            logits[mask] = -math.inf
            total -= float(logits.log_softmax(-1)[token])
        expected.append(total)
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    assert tokens.tolist() == [2, 3]


def test_without_single_blocks_its_bound_judges(tokenizer):
    single = {"block_sizes": None}
    assert tuning._judging(made(tokenizer, **single), tokenizer, wish(), "cpu")[1] == (
        "the model's own bound, L' = 4"
    )
    causal = made(tokenizer, causal=True, **single)
    assert tuning._judging(causal, tokenizer, wish(), "cpu")[1] == "the model itself"
    assert has_single_blocks(made(tokenizer).config)
    assert not has_single_blocks(made(tokenizer, **single).config)


def test_another_judge_reads_text(tokenizer, tmp_path):
    """Of its own tokens, those behind the beginning; against its logits."""
    other = train_tokenizer([text.upper() + text for text in TEXTS], 280)
    config = GPT2Config(vocab_size=len(other), n_positions=256, n_embd=16, n_layer=1, n_head=2)
    gpt2 = GPT2LMHeadModel(config).eval()
    gpt2.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    judge, name = tuning._judging(made(tokenizer), tokenizer, wish(judge=str(tmp_path)), "cpu")
    assert name == str(tmp_path)
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    nats, tokens = judge([ids[:5], ids[:6]], [ids[5:], ids[6:]])
    row = [other.bos_token_id, *other.encode(TEXTS[0], add_special_tokens=False)]
    with torch.no_grad():
        log_p = gpt2(torch.tensor([row])).logits[0].log_softmax(-1)
    whole = -log_p[range(len(row) - 1), row[1:]].numpy().sum()
    # Where a token reaches across the seam, the beginning's own tokens are what is taken off.
    for i, n in enumerate((5, 6)):
        before = tokenizer.decode(ids[:n])
        taken, count = load_judge(tmp_path, device="cpu").nats([before])
        assert nats[i] == pytest.approx(whole - taken.item(), rel=1e-5)
        assert tokens[i] == len(row) - 1 - count.item() > 0


def test_paired_errors():
    rng = np.random.default_rng(0)
    a, b, ones = rng.normal(size=50), rng.normal(size=50), np.ones(50)
    assert paired_error(a, ones, b, ones) == pytest.approx(mean_error(a - b))
    n = rng.integers(3, 9, size=50)
    assert paired_error(a, n, 0 * a, n) == pytest.approx(ratio_error(a, n))
    assert paired_error(a, n, a, n) == 0 and math.isnan(paired_error(a[:1], n[:1], b[:1], n[:1]))


# the choice


def point(name, nats, entropy, speed, texts=8):
    return {
        "options": {"sampler": name, "block_size": 4, "temperature": 1.0},
        "tokens_per_nfe": 1.0, "seconds_per_nfe": [1 / speed] * 3, "nfe": 8.0,
        "divergence": {"1": {"value": 0.1, "stderr": 0.0}, "2": {"value": 0.2, "stderr": 0.0}},
        "texts": {"nats": [nats * 8] * texts, "tokens": [8.0] * texts,
                  "entropy": [entropy] * texts},
    }  # fmt: skip


def record_of(*points):
    base = points[0]["options"]
    names = ("model", "data", "part", "texts", "max_new_tokens", "prompt_tokens", "judge",
             "batch_size", "precision", "device")  # fmt: skip
    return {
        "settings": {**dict.fromkeys(names, "starter"), "reference": base},
        "real": {"texts": points[0]["texts"]}, "points": list(points), "written": None,
    }  # fmt: skip


BASE = point("first_hitting", 3.0, 4.0, 100)
CHOICES = [
    # (points beside the reference, the chosen one's name)
    ([], "first_hitting"),
    ([point("a", 3.04, 4.0, 200), point("b", 3.0, 4.0, 150)], "a"),
    ([point("a", 3.06, 4.0, 200), point("b", 3.04, 4.0, 150)], "b"),  # e^0.06 > 1.05
    ([point("a", 2.0, 3.9, 200), point("b", 3.0, 3.93, 150)], "b"),  # 0.975 and 0.9825
    ([point("a", 3.5, 4.0, 200), point("b", 2.0, 3.0, 150)], "first_hitting"),
    ([point("a", 2.0, 4.0, 90)], "first_hitting"),  # better, not faster
    ([point("a", math.inf, 4.0, 900), point("b", math.nan, 4.0, 800)], "first_hitting"),
    ([point("a", 3.0, 5.0, 101)], "a"),  # livelier is not duller
]


@pytest.mark.parametrize(("others", "name"), CHOICES)
def test_the_choice(others, name):
    record = json.loads(json.dumps(record_of(BASE, *others)))
    decide(record, 0.05, 0.02)
    assert record["points"][record["chosen"]]["options"]["sampler"] == name
    assert record["points"][record["reference"]]["options"]["sampler"] == "first_hitting"
    loose = json.loads(json.dumps(record_of(BASE, *others)))
    decide(loose, 1e3, 1.0)
    found = [one for one in loose["points"] if one["texts"]["nats"][0] < 100]
    assert loose["points"][loose["chosen"]]["tokens_per_second"] == max(
        one["tokens_per_second"] for one in found
    )
    assert name in tuning_table(record).splitlines()[-1]
    assert frontier_plot(record).axes


def test_a_choice_is_faster_in_every_timing():
    shaky = point("a", 3.0, 4.0, 200) | {"seconds_per_nfe": [1 / 200, 1 / 300, 1 / 90]}
    record = record_of(BASE, shaky)
    decide(record, 0.05, 0.02)
    assert record["chosen"] == record["reference"] == 0
    assert record["points"][1]["tokens_per_second"] == pytest.approx(200)


def test_the_frontier_leaves_out_what_is_dull_and_what_is_beaten():
    record = record_of(
        BASE, point("fast", 4.0, 4.0, 200), point("beaten", 4.1, 4.0, 150),
        point("dull", 1.0, 3.0, 900), point("slow", 2.5, 4.0, 50),
    )  # fmt: skip
    record["points"][1]["tokens_per_nfe"] /= 2  # fast, by evaluations that are cheaper still
    record["points"][1]["seconds_per_nfe"] = [s / 2 for s in record["points"][1]["seconds_per_nfe"]]
    decide(record, 0.05, 0.02)
    on = ["tokens_per_second" in one["frontier"] for one in record["points"]]
    assert on == [True, True, False, False, True]
    on = ["tokens_per_nfe" in one["frontier"] for one in record["points"]]
    assert not on[1] and not on[3] and on[4]
    # In either panel the line joins what is best there: more for it costs perplexity.
    for axes, figure in zip(
        frontier_plot(record).axes, ("tokens_per_second", "tokens_per_nfe"), strict=True
    ):
        x, y = axes.lines[0].get_data()
        assert len(x) >= 1 and (np.diff(x) >= 0).all() and (np.diff(y) >= 0).all()
        best = [p for p in record["points"] if p["lively"]]
        assert max(p[figure] for p in best) == x[-1]
    assert frontier_plot(record).axes[0].lines[0].get_xdata().tolist() == [50, 100, 200]


def test_figures_are_means_and_paired_ratios():
    rng = np.random.default_rng(1)
    texts = [
        {"nats": rng.uniform(10, 20, 9).tolist(), "tokens": rng.integers(5, 9, 9).tolist(),
         "entropy": rng.uniform(2, 3, 9).tolist()} for _ in range(2)
    ]  # fmt: skip
    found = texts_figures(*texts)
    rates = [np.sum(x["nats"]) / np.sum(x["tokens"]) for x in texts]
    assert found["perplexity"]["value"] == pytest.approx(math.exp(rates[0]))
    assert found["perplexity_ratio"]["value"] == pytest.approx(math.exp(rates[0] - rates[1]))
    entropy = [np.mean(x["entropy"]) for x in texts]
    assert found["entropy_ratio"]["value"] == pytest.approx(entropy[0] / entropy[1])
    same = texts_figures(texts[0], texts[0])
    assert same["perplexity_ratio"] == {"value": 1.0, "stderr": 0.0}
    assert same["entropy_ratio"] == {"value": 1.0, "stderr": 0.0}


# the whole


def test_tune_writes_what_generate_reads(folder, corpus, capsys):
    before = json.loads((folder / "generation_config.json").read_text())
    cli.main(["tune", str(folder), corpus, *FLAGS, "--tolerance", "1000",
              "--entropy-tolerance", "1", "--json"])  # fmt: skip
    record = json.loads(capsys.readouterr().out)
    assert len(record["points"]) == 7 and record["settings"]["texts"] == 4
    assert (folder / "tuning" / "tuning.png").stat().st_size > 10_000
    stored = json.loads((folder / "tuning" / "tuning.json").read_text())
    assert len(stored["points"][0]["texts"]["nats"]) == 4
    for one in record["points"]:
        assert "texts" not in one and one["nfe"] >= 1 and one["tokens_per_second"] > 0
        size = one["options"]["block_size"]
        assert one["tokens_per_nfe"] <= size
    chosen = record["points"][record["chosen"]]["options"]
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == before | {
        "blockdiff": {name: value for name, value in chosen.items() if name != "temperature"}
    }
    cli.main(["generate", str(folder), "the", "--max-new-tokens", "4", "--json"])
    options = json.loads(capsys.readouterr().out)["options"]
    assert options == options | chosen
    # Nothing is measured anew, and a narrower choice is another one.
    cli.main(["tune", str(folder), corpus, *FLAGS, "--tolerance", "0", "--entropy-tolerance", "0"])
    table = capsys.readouterr().out
    assert f"written into {folder}" in table and "real text" in table
    # The folder can still be replaced by those commands that replace folders of ours.
    from blockdiff.folders import claim

    with claim(folder, overwrite=True, kinds=("model",)):
        pass


def test_no_write_and_what_is_not_ones_own(folder, corpus, capsys, tmp_path):
    before = (folder / "generation_config.json").read_bytes()
    few = ["--orders", "threshold", "--thresholds", "0.5", "--block-sizes", "4"]
    cli.main(
        ["tune", str(folder), corpus, *FLAGS, *few, "--no-write", "--out", str(tmp_path / "o")]
    )
    assert "not written: as asked" in capsys.readouterr().out
    assert (folder / "generation_config.json").read_bytes() == before
    assert not (folder / "tuning").exists()
    assert own_folder("starter") is None and own_folder("user/model") is None
    record = record_of(BASE)
    decide(record, 0.05, 0.02)
    assert summary(record).endswith("not written: starter is not a folder of yours")


def test_the_rest_of_generation_config_json_stays(folder, tokenizer):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "blockdiff": {
        "sampler": "threshold", "threshold": 0.4, "top_p": 0.9}}))  # fmt: skip
    store_options(folder, {"sampler": "confidence", "tokens_per_step": 2}, {})
    assert json.loads(path.read_text()) == {
        "do_sample": True, "temperature": 0.6,
        "blockdiff": {"top_p": 0.9, "sampler": "confidence", "tokens_per_step": 2},
    }  # fmt: skip
    path.unlink()
    store_options(folder, {"sampler": "threshold"}, {"eos_token_id": 3})
    assert load_model(folder).generation_config.eos_token_id == 3


def test_the_folders_other_options_are_in_force(folder, corpus, monkeypatch):
    path = folder / "generation_config.json"
    ask = {"sampler": "threshold", "threshold": 0.4, "top_p": 0.9, "temperature": 0.7, "seed": 9}
    path.write_text(json.dumps({"blockdiff": ask}))
    seen, generate = [], tuning.generate_tokens
    monkeypatch.setattr(
        tuning, "generate_tokens",
        lambda model, prompts, options, *rest: seen.append(options)
        or generate(model, prompts, options, *rest),
    )  # fmt: skip
    tune(folder, wish(corpus, orders="confidence", block_sizes="4"), device="cpu")
    assert {(x.top_p, x.temperature, x.threshold, x.seed) for x in seen} == {(0.9, 0.7, None, 0)}
    assert json.loads(path.read_text())["blockdiff"]["temperature"] == 0.7


def test_a_rerun_measures_what_is_missing(folder, corpus, monkeypatch):
    """Stopped at the third point, and gone on with: the same texts as in one go."""
    written, generate = [], tuning.generate_tokens

    def stopping(model, prompts, options, *rest):
        if len(prompts) == 4:
            written.append(options.sampler)
        if len(written) == stop:
            raise KeyboardInterrupt
        return generate(model, prompts, options, *rest)

    monkeypatch.setattr(tuning, "generate_tokens", stopping)
    stop = 0
    whole = tune(folder, wish(corpus, write=False, out=f"{folder}/../whole"), device="cpu")
    points = len(written)
    written.clear()
    asked, stop = wish(corpus, write=False), 3
    with pytest.raises(KeyboardInterrupt):
        tune(folder, asked, device="cpu")
    stop = 0
    written.clear()
    record = tune(folder, asked, device="cpu")
    assert len(written) == points - 2
    assert [one["texts"] for one in record["points"]] == [one["texts"] for one in whole["points"]]
    written.clear()
    again = tune(folder, asked, device="cpu")
    assert not written
    assert [x["seconds_per_nfe"] for x in again["points"]] == [
        x["seconds_per_nfe"] for x in record["points"]
    ]
    # More values: only those are new; all are timed in one sitting.
    more = tune(folder, wish(corpus, write=False, thresholds="0.9,0.35"), device="cpu")
    assert len(written) == 1 and len(more["points"]) == points + 1
    # Other settings, another model.
    with pytest.raises(InputError, match=r"was measured with seed 0, not 1.*`overwrite`"):
        tune(folder, wish(corpus, seed=1), device="cpu")
    model = load_model(folder)
    with torch.no_grad():
        model.output.linear.weight += 0.1
    save_model(model, folder)
    with pytest.raises(InputError, match="was measured with fingerprint"):
        tune(folder, asked, device="cpu")
    written.clear()
    tune(folder, wish(corpus, write=False, overwrite=True), device="cpu")
    assert len(written) == points
    (folder / "tuning" / "tuning.json").write_text("[]")
    with pytest.raises(InputError, match="is not what tune wrote"):
        tune(folder, asked, device="cpu")


BAD = [
    (["--orders", "beam"], "--orders 'beam' is unknown; choose one of"),
    (["--orders", ""], "--orders '' is unknown"),
    (["--thresholds", ""], "--thresholds is ''; it must be different numbers"),
    (["--thresholds", "0.5,0.5"], "--thresholds is '0.5,0.5'"),
    (["--thresholds", "0.5,1.5"], "threshold is 1.5; it must be at most 1"),
    (
        ["--orders", "entropy_bound", "--entropy-bounds", "-1"],
        "entropy_bound is -1.0; it must be at least 0",
    ),
    (
        ["--entropy-bounds", "0.1"],
        "--entropy-bounds is read by none of the --orders; add entropy_bound",
    ),
    (["--steps", "2", "--tokens-per-step", "2"], "--steps and --tokens-per-step both say"),
    (["--steps", "x"], "--steps is 'x'"),
    (["--block-sizes", "0"], "--block-sizes is 0; it must be at least 1"),
    (["--block-sizes", "5"], "5"),
    (["--temperatures", "-1"], "temperature is -1.0"),
    (["--samples", "1"], "--samples is 1; it must be at least 2"),
    (["--tolerance", "-0.1"], "--tolerance is -0.1; it must be at least 0"),
    (["--entropy-tolerance", "2"], "--entropy-tolerance is 2.0; it must be at most 1"),
    (["--orders", "ancestral"], "the ancestral sampler cannot do without --steps"),
    (["--orders", "analytic", "--steps", "2"], "analytic"),
    (["--prompt-tokens", "500"], "0 beginnings of 500 tokens that go on; lower --prompt-tokens"),
    (["--judge", "nowhere/at-all"], "nowhere/at-all"),
    (["--part", "train", "--validation-fraction", "2"], "--validation-fraction is 2.0"),
    (["--max-new-tokens", "40"], "40"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_input(folder, corpus, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", str(folder), corpus, *FLAGS, *words])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and said in error[0], error
    assert not (folder / "tuning").exists()


def test_places_that_cannot_be_written_to(corpus, capsys, tmp_path, folder):
    for words, said in (
        (["starter", corpus], "nothing is written into starter: name a folder"),
        ([str(folder), corpus, "--out", corpus], "is a file"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["tune", *words, *FLAGS])
        assert said in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    Path(other, "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(notes.txt\)"):
        tune(folder, wish(corpus, out=str(other)), device="cpu")
