"""Evaluations in few shapes, replayed: on a CPU all but the recording itself."""

import numpy as np
import pytest
import torch

from adapted.families import adapted
from blockdiff import Engine, SamplingOptions
from blockdiff.cache import BlockCache, LayerShape
from blockdiff.device import rounded_up
from blockdiff.sampling import recorded
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.prefill import Prefixes
from blockdiff.sampling.recorded import Recorded
from helpers import random_tokens, tiny_model

MODELS = {
    "block": {}, "causal": {"clean_stream": "causal", "block_sizes": (1, 4)},
    "shift": {"clean_stream": "causal", "prediction": "shift"}, "ar": {"causal": True},
    "timed": {"time_conditioning": True}, "mdlm": {"block_size": 16, "length": 16},
}  # fmt: skip
WISHES = [
    {}, {"tokens_per_step": 2}, {"sampler": "verified"}, {"steps": 3, "sampler": "ancestral"},
    {"cfg_scale": 0.5}, {"top_p": 0.8},
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setattr(recorded, "DEVICES", {"cpu"})


def model_of(kind):
    return tiny_model(9, **({"length": 24, "bos_token_id": 0, "seed": 3} | MODELS[kind]))


@pytest.mark.parametrize("kind", MODELS)
def test_texts_are_those_of_evaluations_as_they_come(kind):
    """Rows of different lengths, to three contexts, that end one after another."""
    model = model_of(kind)
    prompts = [random_tokens(model, length, seed=length).tolist() for length in (1, 7, 18)]
    for wish in WISHES:
        if wish.get("sampler") == "verified" and kind in ("block", "timed", "mdlm"):
            continue
        options = SamplingOptions(max_new_tokens=50, stop="none", **wish)
        model.graphs = False
        expected = generate_tokens(model, prompts, options).tokens
        model.graphs = True
        assert generate_tokens(model, prompts, options).tokens == expected, wish


def test_shapes_are_few():
    """For a text of any length: of the cache powers of two, of wanted positions, too."""
    model = tiny_model(9, length=128)
    engine = Engine(model)
    for length in (1, 5, 9):
        engine.admit([1] * length, SamplingOptions(max_new_tokens=110, stop="none"))
    shapes = set()
    while engine.active:
        engine.step()
        shapes |= {key[2:] for key in engine._decode._made}
    used = {key[0] for key in shapes}
    assert used <= {0, 1, 2, 4, 8, 16, 32, 64, 116, 120} and len(shapes) < 20


def test_what_was_written_is_a_known_beginning():
    """Also of a row that ends among others and is dropped at once, as a server does."""
    model = tiny_model(9, length=64, clean_stream="causal")
    prefixes = Prefixes(model.config, 2**20)
    engine = Engine(model, prefixes=prefixes)
    names = [
        engine.admit([1, number], SamplingOptions(max_new_tokens=new, stop="none"))
        for number, new in enumerate((8, 50, 50))
    ]
    done = False
    while not done:
        step = engine.step()
        done = bool(step.done[0])
    text = step.tokens[0][:8].numpy()
    engine.drop(names[0])
    assert sum(part[0][0].shape[2] for part in prefixes.find(text, 4, 0)) == 8


def test_what_was_given_is_never_written_over():
    model = tiny_model(9, length=24)
    cache = model.new_cache(2, 8, 4)
    cache.rounded = True
    cache.admit(np.arange(2), np.full(2, 4), np.full(2, 8))
    decode = Recorded(model.decode)
    x = random_tokens(model, 2, 4)
    place, at = torch.arange(4).expand(2, -1), torch.tensor([0, 5, 6])
    first = decode(x, place, cache, at)
    kept = first.clone()
    other = decode((x + 1) % 8, place, cache, at)
    assert torch.equal(first, kept) and not torch.equal(first, other)
    assert len(decode._made) == 1 and first.shape == (3, 9)
    torch.testing.assert_close(first, model.decode(x, place, cache, at))


def test_tensors_that_are_made_anew_are_recorded_anew():
    model = tiny_model(9, length=24)
    engine = Engine(model)
    engine.admit([1], SamplingOptions(max_new_tokens=20, stop="none"))
    engine.step()
    engine.step()
    (old,) = engine._decode._made
    engine.admit_all([[2] * 4] * 5, SamplingOptions(max_new_tokens=12, stop="none"))
    engine.step()
    engine.step()
    assert old not in engine._decode._made


@pytest.mark.parametrize("lengths", [[0], [3], [9, 2], [24, 24]])
def test_slots_of_a_rounded_cache(lengths):
    """A power of two, and never more than a row may hold; slots without a token are hidden."""
    rows = np.arange(len(lengths))
    caches = []
    for rounded in (False, True):
        cache = BlockCache([LayerShape(1, 2, 2)], len(rows), 20, 4)
        cache.rounded = rounded
        cache.admit(rows, np.full_like(rows, 4), np.full_like(rows, 20))
        for row, length in enumerate(lengths):
            new = torch.randn(1, 1, length, 2, generator=torch.Generator().manual_seed(row))
            cache.append(rows[row : row + 1], [new], [new], np.array([length]))
        caches.append(cache)
    exact, more = caches
    assert more.used == min(rounded_up(exact.used), 20) >= exact.used
    seen = more.visible(0, 4, np.full(len(rows), False))
    if seen is not None:
        there = (seen[:, 0, 0, 4:] == 0).sum(-1).tolist()
        assert there == [min(length, 20) for length in lengths]


@pytest.mark.parametrize(
    "family, recorded",
    [("llama", True), ("gpt2", True), ("mistral", False), ("gemma2", False), ("mixtral", False)],
)
def test_which_adapted_models_are_recorded(family, recorded):
    """Where all that hangs on the cache is in the mask, and nothing waits for the device."""
    model = adapted(family)
    assert model.graphs is recorded
    prompts, options = [[2], [3, 4, 5, 6, 7]], SamplingOptions(max_new_tokens=20, stop="none")
    found = generate_tokens(model, prompts, options).tokens
    model.graphs = False
    assert generate_tokens(model, prompts, options).tokens == found
