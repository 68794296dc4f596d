"""Mixtures: as many windows of each corpus as its weight says, in every epoch and process."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import blockdiff
from blockdiff import cli
from blockdiff.data.mixture import MixedStream, MixedWindows
from blockdiff.errors import InputError
from blockdiff.training.config import TrainConfig
from blockdiff.training.data import prepare_data
from blockdiff.training.stored import held_out


class Part(list):
    """Windows as `pack` gives them, for what a mixture reads."""

    def __init__(self, name, count):
        super().__init__({"x_0": torch.tensor([name, i])} for i in range(count))
        self.key = f"{name} {count}"


def drawn(windows):
    """corpus → how often each of its windows occurs."""
    found = {}
    for i in range(len(windows)):
        name, place = windows[i]["x_0"].tolist()
        found.setdefault(name, Counter())[place] += 1
    return found


@pytest.mark.parametrize("weights", [[0.7, 0.3], [0.5, 0.5], [0.05, 0.95], [0.2, 0.8]])
def test_an_epoch_has_every_window_and_the_proportion(weights):
    found = drawn(MixedWindows([Part(0, 40), Part(1, 10)], weights))
    counts = [found[i].total() for i in (0, 1)]
    assert counts[0] / sum(counts) == pytest.approx(weights[0], abs=0.5 / sum(counts) + 1e-9)
    assert [len(found[i]) for i in (0, 1)] == [40, 10]
    for one in found.values():  # none much more often than another
        assert max(one.values()) - min(one.values()) <= 1
    assert min(min(one.values()) for one in found.values()) == 1, "as short as possible"


def test_without_repeating_each_window_comes_once_at_most():
    windows = MixedWindows([Part(0, 40), Part(1, 10)], [0.7, 0.3], repeat=False)
    found = drawn(windows)
    assert windows.counts == [23, 10] and all(set(one.values()) == {1} for one in found.values())
    with pytest.raises(InputError, match="leave one without any"):
        MixedWindows([Part(0, 2), Part(1, 10)], [0.99, 0.01], repeat=False)


def test_its_key_is_of_the_texts_and_the_proportion():
    def key(*counts, weights=(0.5, 0.5)):
        return MixedWindows([Part(i, n) for i, n in enumerate(counts)], weights).key

    assert key(4, 4) == key(4, 4)
    assert len({key(4, 4), key(4, 5), key(4, 4, weights=(0.75, 0.25))}) == 3


def test_a_stream_draws_each_window_by_its_weight():
    parts = [itertools.repeat(0), itertools.repeat(1)]
    first, again = (list(itertools.islice(MixedStream(parts, [0.8, 0.2], 3, 0), 2000))
                    for _ in range(2))  # fmt: skip
    assert first == again, "the same seed, the same corpora"
    assert first != list(itertools.islice(MixedStream(parts, [0.8, 0.2], 3, 1), 2000))
    # A binomial's standard error is 0.009; 4 of them.
    assert abs(sum(first) / 2000 - 0.2) < 0.036
    assert len(list(MixedStream([[1, 2], [1]], [0.5, 0.5], 0, 0))) <= 3, "ends with a part"


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sea.txt").write_text("The law of the land is the law of the sea. " * 300)
    Path("sky.txt").write_text("Wide blue skies hang over quiet hills and towns. " * 90)
    return ["sea.txt", "sky.txt"]


def options(texts, **changes):
    return {
        "data": texts, "data_weights": "3,1", "out": "out", "steps": 3, "batch_size": 4,
        "length": 8, "vocab_size": 270, "eval_windows": 8, "report_to": "none", **changes,
    }  # fmt: skip


def test_both_sides_are_mixed_and_each_text_is_split_on_its_own(texts):
    config = TrainConfig(**options(texts, eval_windows=0))
    data = prepare_data(config)
    assert data.train.counts[0] / sum(data.train.counts) == pytest.approx(0.75, abs=0.01)
    words = data.tokenizer.batch_decode(data.validation["x_0"])
    share = sum("law" in text or "land" in text or "sea" in text for text in words) / len(words)
    assert 0.5 < share < 1
    alone = prepare_data(TrainConfig(**options("sky.txt", data_weights=None, eval_windows=0,
                                               tokenizer=None)))  # fmt: skip
    assert alone.fingerprints.keys() == data.fingerprints.keys()
    assert len(data.train.parts) == 2


def test_a_mixed_run_resumes_and_its_held_out_text_is_measured(texts, capsys):
    import torch

    whole = blockdiff.train(TrainConfig(**options(texts, out="whole", steps=4)), progress=False)
    blockdiff.train(TrainConfig(**options(texts, save_every=2, steps=2)), progress=False)
    resumed = blockdiff.train(TrainConfig(out="out", resume=True, steps=4), progress=False)
    from safetensors.torch import load_file

    ours, theirs = (load_file(run.folder / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads(Path("out/run.json").read_text())["data_weights"] == "3,1"
    told = held_out("out")
    assert told is not None and told["data_weights"] == "3,1"
    for words in ([*texts], [texts[1]]):
        capsys.readouterr()
        flags = [flag for word in words for flag in ("--data", word)]
        cli.main(["evaluate", "out", *flags, "--windows", "4", "--json"])
        assert json.loads(capsys.readouterr().out)["part"] == "validation"


def test_what_the_split_holds_out_is_the_same_text_for_evaluate(texts):
    from blockdiff.evaluation.corpus import open_documents
    from blockdiff.training.data import _open, _split

    config = TrainConfig(**options(texts))
    ours = [_split(config, one, _open(config, one, "train"), False)[1] for one in texts]
    theirs = open_documents(texts, part="validation", split_seed=config.seed, apart=True)
    assert [text for one in ours for text in one] == list(theirs)


@pytest.mark.parametrize("weights", ["1", "1,2,3", "a,b", "1,0", "1,-1", "1,inf", "1,nan", ""])
def test_weights_are_one_positive_number_a_corpus(texts, weights):
    with pytest.raises(InputError, match="`data_weights`"):
        TrainConfig(**options(texts, data_weights=weights))


def test_streams_can_be_mixed(texts):
    done = blockdiff.train(TrainConfig(**options(texts, data_weights=None, out="words")),
                           progress=False)  # fmt: skip
    config = options(texts, streaming=True, tokenizer=str(done.folder), validation_data="sky.txt")
    assert blockdiff.train(TrainConfig(**config), progress=False).steps == 3
