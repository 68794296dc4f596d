"""Beginnings of texts that are known already: the same tokens, and less is computed."""

import zlib

import numpy as np
import pytest
import torch

from adapted.families import CONTEXT, MASK, adapted, shifted_dit, tokens
from blockdiff import Engine, SamplingOptions
from blockdiff.cache import BlockCache, LayerShape
from blockdiff.sampling.generate import generate_tokens
from blockdiff.sampling.prefill import PIECE, Prefixes
from helpers import tiny_model


def dit(**settings):
    return tiny_model(**{"vocab_size": MASK + 1, "length": CONTEXT, "block_size": 4} | settings)


def behind_the_prompt():
    model = adapted("qwen3", clean="causal")
    model.config.prompt_grid = "prompt_end"
    return model


def block_causal_behind_the_prompt():
    model = dit()
    model.config.prompt_grid = "prompt_end"
    return model


MODELS = {
    "block-causal": dit,
    "timed": lambda: dit(time_conditioning=True),
    "causal clean stream": lambda: dit(clean_stream="causal"),
    "ar": lambda: dit(causal=True),
    "dit, shift": shifted_dit,
    "llama, causal, shift": lambda: adapted("llama", clean="causal", prediction="shift"),
    "llama, block-causal": lambda: adapted("llama", clean="block", prediction="same"),
    "sliding layers": lambda: adapted("gemma2", clean="causal", prediction="shift"),
    "blocks from the prompt's end": behind_the_prompt,
    "block-causal from the prompt's end": block_causal_behind_the_prompt,
}
EVERY_MODEL = pytest.mark.parametrize("name", list(MODELS))
BEGINNING = tokens(1, 40, seed=5)[0].tolist()
# How much of the beginning, and what follows it.
ASKED = [(23, []), (23, []), (26, [1, 2, 3]), (9, [5]), (0, [7, 8, 9, 1, 2])]


@pytest.fixture
def computed(monkeypatch):
    """A function that tells how many tokens went through a model's network since it was asked."""
    count = [0]

    def watch(model):
        for name in ("encode", "decode"):
            real = getattr(model, name)

            def spy(x, *rest, _real=real, **options):
                count[0] += x.numel()
                return _real(x, *rest, **options)

            monkeypatch.setattr(model, name, spy)

    def since():
        count[0], found = 0, count[0]
        return found

    since.watch = watch
    return since


def run(engine, prompt, options, number):
    """(tokens, how many of the prompt were known, nfe) of one row, dropped at its end."""
    name = engine.admit(prompt, options, number)
    while engine.active:
        step = engine.step()
    row = engine.rows.state[engine.rows.state["name"] == name][0]
    (place,) = (step.rows == name).nonzero().flatten().tolist()
    found = step.tokens[place, len(prompt) : step.lengths[place]].tolist()
    engine.drop(name)
    return found, int(row["cached"]), int(row["nfe"])


def grids_of(model):
    """Options for several block sizes, and for rows that are drafted and verified."""
    new = {"max_new_tokens": 5, "stop": "none", "seed": 3}
    if model.config.causal:
        return [SamplingOptions(**new), SamplingOptions(**new, sampler="verified")]
    found = [SamplingOptions(**new, block_size=size) for size in (4, 2)]
    if model.config.clean_stream == "causal" and model.config.prediction == "shift":
        found.append(SamplingOptions(**new, sampler="verified"))
    return found


@EVERY_MODEL
@pytest.mark.filterwarnings("ignore:the model was trained with block size")
def test_the_same_tokens_whatever_is_known(name):
    """One after the other, in several grids that share a store, and against no store."""
    model = MODELS[name]()
    engine = Engine(model, prefixes=Prefixes(model.config, 2**24))
    known = []
    for number, (shared, more) in enumerate(ASKED):
        for options in grids_of(model):
            prompt = BEGINNING[:shared] + more
            found, cached, nfe = run(engine, prompt, options, number)
            alone = generate_tokens(model, [prompt], options, rows=[number])
            assert found == alone.tokens[0]
            assert nfe in ((alone.nfe[0], alone.nfe[0] - 1) if cached else alone.nfe)
            assert 0 <= cached <= len(prompt)
            known.append(cached)
    assert sum(known) > 40
    width = len(grids_of(model))
    assert known[0] == known[-width] == 0  # a new text; what follows may know it from another grid
    again = known[width : 2 * width]  # the same prompt once more: all but less than a block
    assert min(again) >= 23 - 2 * 4


@EVERY_MODEL
def test_what_is_put_together_is_what_the_network_gives(name):
    """Keys and values in the cache, with a beginning that is known and without."""
    model, options = MODELS[name](), SamplingOptions(max_new_tokens=9, stop="none")
    caches = []
    for prefixes in (None, Prefixes(model.config, 2**24)):
        engine = Engine(model, prefixes=prefixes)
        if prefixes is not None:
            # On the grid of the second prompt, wherever the first ends.
            run(engine, BEGINNING[:28], options, 0)
        engine.admit([*BEGINNING[:32], 3, 1, 4, 1], options, 1)
        engine.step()
        caches.append(engine.cache)
        if prefixes is not None:
            assert engine.rows.state["cached"][0] >= 16
    plain, found = caches
    assert plain.lengths.tolist() == found.lengths.tolist()
    length = int(plain.lengths[0])
    assert length >= 32
    for expected, got in zip(plain.part(0, 0, length), found.part(0, 0, length), strict=True):
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["block-causal", "ar", "llama, causal, shift"])
def test_less_is_computed(name, computed):
    model = MODELS[name]()
    options = SamplingOptions(max_new_tokens=1, stop="none")
    engine = Engine(model, prefixes=Prefixes(model.config, 2**24))
    computed.watch(model)
    costs = []
    for more in ([], [], [1, 2]):
        run(engine, BEGINNING + more, options, 0)
        costs.append(computed())
    assert costs[1] <= costs[0] - 36 and costs[2] <= costs[0] - 30


@pytest.mark.parametrize("name", ["block-causal", "causal clean stream"])
def test_the_text_that_was_written_is_known_as_well(name):
    """The next message of a conversation begins with the answer before it."""
    model, options = MODELS[name](), SamplingOptions(max_new_tokens=16, stop="none")
    engine = Engine(model, prefixes=Prefixes(model.config, 2**24))
    answer, _, _ = run(engine, BEGINNING[:12], options, 0)
    prompt = BEGINNING[:12] + answer + [1, 2]
    found, cached, _ = run(engine, prompt, options, 1)
    assert cached == 24  # the last block was final as the row ended, and never cached
    assert found == generate_tokens(model, [prompt], options, rows=[1]).tokens[0]


def test_many_rows_at_once_of_which_some_begin_alike(computed):
    """Those that come together are read once where they are equal."""
    model, options = MODELS["block-causal"](), SamplingOptions(max_new_tokens=6, stop="none")
    prefixes = Prefixes(model.config, 2**24)
    engine = Engine(model, prefixes=prefixes)
    computed.watch(model)
    prompts = [BEGINNING[:32]] * 5
    names = engine.admit_all(prompts, options)
    engine.step()
    assert computed() == 32
    mixed = [BEGINNING[:32], BEGINNING[:20], [1, 2, 3, 4, 5], BEGINNING[:16] + [1] * 8, [2]]
    names += engine.admit_all(mixed, options)
    while engine.active:
        step = engine.step()
    expected = generate_tokens(model, prompts + mixed, options).tokens
    for place, (name, prompt) in enumerate(zip(names, prompts + mixed, strict=True)):
        assert step.rows[place] == name
        found = step.tokens[place, len(prompt) : step.lengths[place]].tolist()
        assert found == expected[place]
    assert engine.rows.state["cached"].tolist() == [0] * 5 + [32, 16, 0, 16, 0]


def test_a_window_that_slides():
    """What outgrew its cache is neither kept nor looked for; its prompt may be."""
    model, options = MODELS["block-causal"](), SamplingOptions(max_new_tokens=60, stop="none")
    prefixes = Prefixes(model.config, 2**24)
    engine = Engine(model, prefixes=prefixes)
    long = tokens(1, 70, seed=8)[0].tolist()
    for number, prompt in enumerate([BEGINNING, BEGINNING, long, long]):
        found, cached, _ = run(engine, prompt, options, number)
        assert found == generate_tokens(model, [prompt], options, rows=[number]).tokens[0]
        assert cached == (len(prompt) if number == 1 else 0)


def whole_slots(prefixes):
    """Bytes of the slots in use, each of which has one user or none; the slabs are in the room."""
    slots = prefixes._slots
    used = [slot for piece in prefixes._pieces.values() for slot, _ in piece]
    assert sorted(used + slots.free) == list(range(slots.made))
    slabs = [slab[0].untyped_storage().nbytes() for slab in slots._slabs]
    assert slots.made * slots.bytes == sum(slabs) <= prefixes.room
    return len(used) * slots.bytes


def test_the_store_is_bounded_and_forgets_the_oldest():
    model, options = MODELS["block-causal"](), SamplingOptions(max_new_tokens=1, stop="none")
    whole = Prefixes(model.config, 2**24)
    run(Engine(model, prefixes=whole), BEGINNING, options, 0)
    one = whole.held
    prefixes = Prefixes(model.config, int(2.5 * one))
    engine = Engine(model, prefixes=prefixes)
    texts = [tokens(1, 40, seed=seed)[0].tolist() for seed in range(4)]
    for text in (*texts[:2], texts[0], texts[2]):
        run(engine, text, options, 0)
        assert prefixes.held <= prefixes.room
        assert prefixes.held == whole_slots(prefixes)
    cached = [run(engine, text, options, 0)[1] for text in (texts[0], texts[2])]
    assert cached == [40, 40]
    # Of the one that was not asked for again the end went first: its beginning may be there still.
    assert run(engine, texts[1], options, 0)[1] < 40
    nothing = Prefixes(model.config, 0)
    engine = Engine(model, prefixes=nothing)
    assert [run(engine, BEGINNING, options, 0)[1] for _ in range(2)] == [0, 0]
    assert nothing.held == 0


def test_pieces_end_with_blocks():
    """By a slow reading: of each length the longest run of kept pieces is found."""
    model = MODELS["block-causal"]()
    cache = BlockCache([(1, 1, 1)] * 1, 1, 48, 4)
    cache = model.new_cache(1, 48, 4)
    cache.admit(np.array([0]), np.array([4]), np.array([48]))
    keys = [torch.rand(1, 2, 48, 8) for _ in range(2)]
    cache.append(np.array([0]), keys, keys, np.array([46]))
    for size, offset in ((4, 0), (4, 2), (1, 0), (2, 1), (32, 0), (6, 5)):
        prefixes, text = Prefixes(model.config, 2**24), np.arange(46)
        kept = 46 - (46 + offset) % size
        prefixes.keep(cache, 0, text[:kept], size, offset)
        for length in range(1, 47):
            whole = max(length - (length + offset) % size, 0)
            parts = prefixes.find(text[:whole], size, offset)
            found = sum(part[0][0].shape[2] for part in parts)
            assert found == 0 or (found <= whole and (found + offset) % size == 0)
            assert found > whole - PIECE - size or found == min(whole, kept)
            other = text[:whole].copy()
            if whole > 20:
                other[20] = 99
                few = prefixes.find(other, size, offset)
                assert sum(part[0][0].shape[2] for part in few) <= 20
        if size > 1:  # another grid knows nothing of it
            assert prefixes.find(text[:kept], size, (offset + 1) % size) == []


def made_up(text, layers, size, offset):
    """Keys and values of each layer: any numbers that follow from what each token sees."""
    ends = (np.arange(len(text)) + offset) // size * size + size - offset
    seen = [zlib.crc32(text[:end].tobytes(), size + 99 * offset) % 9973 for end in ends]
    own = torch.tensor(seen)[:, None] + torch.arange(len(text))[:, None] / 96
    pairs: tuple[list, list] = [], []
    for number, shape in enumerate(layers):
        for tensors, width in zip(pairs, shape[1:], strict=True):
            of_head = torch.arange(shape.heads)[:, None, None] + torch.arange(width) / width
            tensors.append((own * (1 + number + of_head + len(tensors) / 3))[None])
    return pairs


@pytest.mark.parametrize("size, offset", [(1, 0), (4, 3), (6, 5), (16, 0), (20, 7), (48, 11)])
def test_what_is_found_is_what_was_kept_to_the_bit(size, offset, monkeypatch):
    """Texts of a tree in a store that forgets all the time, whose slots lie in several slabs."""
    model = dit(length=96)
    layers = [LayerShape(2, 8, 4), LayerShape(1, 4, 4), LayerShape(2, 8, 4)]
    monkeypatch.setattr("blockdiff.cache.SLAB", 3 * 16 * 4 * 56)
    room = 7 * 16 * 4 * 56 + 5  # seven slots in three slabs
    prefixes, draws, known = Prefixes(model.config, room), np.random.default_rng(size), 0
    for number in range(300):
        # Every tenth token tells one branch from the other.
        text = np.where(np.arange(96) % 10 < 9, 7, draws.integers(0, 2, 96))
        text = text[: max((draws.integers(1, 96) + offset) // size * size - offset, 0)]
        if len(text) == 0:
            continue
        keys, values = made_up(text, layers, size, offset)
        cache = BlockCache(layers, 2, 96, size)
        cache.admit(np.array([4, 5]), np.array([size, size]), np.array([96, 96]))
        if number % 2:  # what is found counts as used, which the others are not when they are kept
            cache.restore(1, prefixes.find(text, size, offset))
        count = int(cache.lengths[1])
        cache.append(np.array([0]), keys, values, np.array([len(text)]))
        for place, length in ((0, len(text)), (1, count)):
            for stores, own in zip(cache._of_layer, zip(keys, values, strict=True), strict=True):
                for store, expected in zip(stores, own, strict=True):
                    there = store[place, :, cache._front :][:, :length]
                    assert torch.equal(there, expected[0, :, :length])
        known += count
        prefixes.keep(cache, 0, text, size, offset)
        assert prefixes.held == whole_slots(prefixes)
        # All of it is there, or as many of its first pieces as there are slots.
        ends, here, left = prefixes._ends(len(text), size, offset), 0, 7
        while here < len(text) and left >= -(-(ends(here)[-1] - here) // PIECE):
            left -= -(-(ends(here)[-1] - here) // PIECE)
            here = ends(here)[-1]
        found = prefixes.find(text, size, offset)
        assert sum(part[0][0].shape[2] for part in found) == here
    assert known > 500 and len(prefixes._slots._slabs) == 3 and prefixes._slots.made == 7


@pytest.mark.parametrize("slots", [1, 3, 5, 8])
def test_a_beginning_is_copied_before_its_slots_are_used_again(slots):
    """Rows that come together: what some have found is forgotten for the others' texts."""
    model, options = MODELS["block-causal"](), SamplingOptions(max_new_tokens=6, stop="none")
    whole = Prefixes(model.config, 2**24)
    run(Engine(model, prefixes=whole), BEGINNING[:12], options, 0)
    prefixes = Prefixes(model.config, slots * whole.held)
    engine = Engine(model, prefixes=prefixes)
    run(engine, BEGINNING, options, 0)
    others = [tokens(1, 36, seed=seed)[0].tolist() for seed in range(3)]
    prompts = [others[0], BEGINNING[:39], others[1], BEGINNING[:20] + [1] * 9, others[2]]
    names = engine.admit_all(prompts, options, range(len(prompts)))
    while engine.active:
        step = engine.step()
    assert (engine.rows.state["cached"][[1, 3]] >= 16).all()
    expected = generate_tokens(model, prompts, options).tokens
    for place, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        assert step.rows[place] == name
        found = step.tokens[place, len(prompt) : step.lengths[place]].tolist()
        assert found == expected[place]
    assert prefixes.held == whole_slots(prefixes) == slots * whole.held
