"""Whole texts of every order against a slow sampler that knows no cache, batch or array."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

import blockdiff
from adapted.families import Slow, tiny
from blockdiff import Engine, SamplingOptions
from blockdiff.categorical import host_uniform
from blockdiff.errors import InputError
from blockdiff.models.adapting import adapt
from blockdiff.sampling.generate import generate_tokens, stream_tokens
from blockdiff.sampling.orders.base import ORDER, TOKEN
from helpers import Operators, read_golden, tiny_model
from sampling.test_confidence import by_hand
from test_released import said, write

MASK = 8
GIVEN = {
    "confidence": {"tokens_per_step": 2},
    "confidence by steps": {"steps": 3},
    "confidence at random": {"remasking": "random", "tokens_per_step": 2},
    "threshold": {"threshold": 0.3},
    "threshold by steps": {"threshold": 0.5, "steps": 2},
    "margin": {"margin": 0.2},
    "most margin": {"sampler": "margin", "tokens_per_step": 2},
    "entropy": {"sampler": "entropy", "steps": 2},
    "entropy bound": {"entropy_bound": 1.3},
    "editing": {"edit_threshold": 0.3, "threshold": 0.25},
    "editing, all of it": {"edit_threshold": 1.0, "tokens_per_step": 3},
}
EVERY = pytest.mark.parametrize("given", list(GIVEN.values()), ids=list(GIVEN))
MODELS = ["block", "causal", "mdlm", *(f"{c} {p}" for c in ("block", "causal")
          for p in ("same", "shift"))]  # fmt: skip
WINDOW = 16  # of mdlm, in one block


@lru_cache
def model_of(kind):
    """(model, logits [K, V] of a block after its clean prefix, whether it predicts the next)."""
    if " " in kind:
        clean, prediction = kind.split()
        own = {"vocab_size": 9, "eos_token_id": None, "bos_token_id": None, "seed": 3}
        lm = tiny("llama", **own)
        how = {"block_size": 4, "clean": clean, "prediction": prediction}
        model = adapt(lm, mask_token_id=MASK, **how)
        slow = Slow(tiny("llama", **own), clean, prediction)
        return model, slow.logits, slow.shift
    settings = {
        "block": {"block_size": 4},
        "causal": {"block_size": 4, "clean_stream": "causal"},
        "mdlm": {"block_size": WINDOW, "length": WINDOW},
    }[kind]
    model = tiny_model(vocab_size=9, **({"length": 24} | settings))

    def logits(prefix, block):
        x = torch.tensor([prefix + block])
        with torch.no_grad():
            return model(x, x_0=x, backend="dense").logits[0, len(prefix) :]

    return model, logits, False


def slow_text(kind, prompt, new, options, number):
    """(new tokens, evaluations of blocks, tokens written over), a position at a time."""
    _, logits_of, shift = model_of(kind)
    size, end, seed = WINDOW if kind == "mdlm" else 4, len(prompt) + new, options.seed
    text, evaluations, edits = list(prompt), 0, 0
    while len(text) < end:
        start = len(text) // size * size
        wanted = end - start if kind == "mdlm" else size
        block = text[start:] + [MASK] * (start + size - len(text))
        fresh = list(range(len(text) - start, wanted))
        place = start + np.arange(size)
        order = host_uniform(seed, number, place, ORDER).tolist()
        u = host_uniform(seed, number, place, TOKEN).tolist()
        planned = len(fresh) if kind == "mdlm" else size - shift
        step, revised = 0, set()
        while True:
            masked = [i in fresh and block[i] == MASK for i in range(size)]
            alone = shift and masked[0]
            if alone:
                masked = [True] + [False] * (size - 1)
            held = [i for i in fresh if block[i] != MASK and i not in revised]
            held = [i for i in held if i > 0 or not shift]
            logits = logits_of(text[:start], block).double()
            logits[:, MASK] = -math.inf
            p = logits.softmax(-1).tolist()
            tempered = logits / options.temperature if options.temperature else logits
            below = tempered.softmax(-1).cumsum(-1).tolist()
            drawn = [
                sum(x <= u[i] for x in below[i]) if options.temperature
                else max(range(9), key=lambda v, i=i: p[i][v])
                for i in range(size)
            ]  # fmt: skip
            changes = {}
            if any(masked):
                fixed = by_hand(options, p, drawn, masked, order, step, planned)
                changes = {i: drawn[i] for i in range(size) if fixed[i]}
            if options.sampler == "editing":
                for i in held:
                    old, new_p = p[i][block[i]], p[i][drawn[i]]
                    if old < options.edit_threshold and new_p > old:
                        changes[i] = drawn[i]
                        revised.add(i)
                        edits += 1
            for i, token in changes.items():
                block[i] = token
            evaluations, step = evaluations + 1, step + (not alone)
            left = [i for i in fresh if block[i] == MASK]
            if options.sampler == "editing":
                more = [i for i in fresh if i not in revised and (i > 0 or not shift)]
                if not left and (not changes or not more):
                    break
            elif not left or start + left[0] >= end:
                break
        text[start:] = block[:wanted] if kind == "mdlm" else block
    return text[len(prompt) : end], evaluations, edits


def rows_for(kind, given):
    longest = 5 if kind == "mdlm" else 11
    wish = {"stop": "none"} | given
    return [
        ([1, 2, 3], SamplingOptions(max_new_tokens=longest, seed=5, **wish)),
        ([4], SamplingOptions(max_new_tokens=6, seed=6, temperature=0.5, **wish)),
        ([7, 0, 2, 5, 1, 1, 3, 6], SamplingOptions(max_new_tokens=longest - 1, seed=5, **wish)),
        ([2, 2, 1, 4, 0], SamplingOptions(max_new_tokens=longest, temperature=0, **wish)),
    ]


@EVERY
@pytest.mark.parametrize("kind", MODELS)
def test_a_text_is_its_definition_alone_in_a_batch_and_streamed(kind, given):
    model, rows = model_of(kind)[0], rows_for(kind, given)
    expected = [slow_text(kind, p, o.max_new_tokens, o, i) for i, (p, o) in enumerate(rows)]
    engine = Engine(model.eval())
    names = [engine.admit(prompt, options) for prompt, options in rows]
    written, over = np.zeros(4, int), np.zeros(4, int)
    while engine.active:
        step = engine.step()
        written += step.fixed.sum(1).numpy()
        if step.edited is not None:
            assert not (step.edited & step.fixed).any()
            over += step.edited.sum(1).numpy()
    for name, (prompt, options), (tokens, evaluations, edits) in zip(
        names, rows, expected, strict=True
    ):
        assert step.tokens[name, len(prompt) : step.lengths[name]].tolist() == tokens
        alone = generate_tokens(model, [prompt], options, rows=[name])
        assert alone.tokens == [tokens]
        prefill = int(alone.nfe[0]) - evaluations
        assert prefill in (0, 1) and step.nfe[name] == alone.nfe[0]
        assert over[name] == edits and written[name] >= len(tokens)


def test_texts_that_are_edited_are_told_apart():
    """Editing changes tokens of these rows, and 0 as its limit leaves those of `threshold`."""
    rows = [r for k in ("block", "causal same") for r in
            ((k, *row) for row in rows_for(k, GIVEN["editing"]))]  # fmt: skip
    found = [slow_text(kind, p, o.max_new_tokens, o, 0) for kind, p, o in rows]
    assert sum(edits for *_, edits in found) > 8
    for kind, prompt, options in rows:
        merged = {"options": options, "rows": [0]}
        model = model_of(kind)[0]
        none = blockdiff.generate(model, [prompt], edit_threshold=0.0, **merged)
        plain = blockdiff.generate(model, [prompt], edit_threshold=None, **merged)
        assert none.tokens == plain.tokens and none.nfe[0] > plain.nfe[0]


@pytest.mark.parametrize("graphs", [False, True])
def test_orders_side_by_side_are_what_they_are_alone(graphs, monkeypatch):
    """All at once, some admitted later; with the shapes that graphs want, too."""
    model = model_of("causal")[0].eval()
    wishes = [{}, {"sampler": "ancestral", "steps": 3}, *GIVEN.values()]
    rows = [
        ([1, 2, 3][: 1 + i % 3], SamplingOptions(max_new_tokens=5 + i, stop="none", seed=i, **wish))
        for i, wish in enumerate(wishes)
    ]
    expected = [generate_tokens(model, [p], o, [i]).tokens[0] for i, (p, o) in enumerate(rows)]
    monkeypatch.setattr(model, "graphs", graphs)
    engine, waiting = Engine(model), list(rows)
    while engine.active or waiting:
        for prompt, options in waiting[:2]:
            engine.admit(prompt, options)
        del waiting[:2]
        step = engine.step()
    for name, (prompt, _) in enumerate(rows):
        found = step.tokens[name, len(prompt) : step.lengths[name]].tolist()
        assert found == expected[name]


def test_parts_of_a_block_are_edited_one_after_the_other():
    model, wish = model_of("mdlm")[0], {"max_new_tokens": 12, "stop": "none", "sub_block": 4}
    given, prompts = wish | GIVEN["editing, all of it"], [[1, 2, 3], [4, 0]]
    both = blockdiff.generate(model, prompts, **given)
    for row, prompt in enumerate(prompts):
        alone = blockdiff.generate(model, [prompt], rows=[row], **given)
        assert (alone.tokens[0], alone.nfe[0]) == (both.tokens[row], both.nfe[row])
    shown, edited = [], 0
    for step in blockdiff.stream(model, prompts[:1], **given):
        now, inside = step.final(0, 3, MASK), step.edited[0, 3:].nonzero().flatten().tolist()
        assert now[: len(shown)] == shown and all(i >= len(shown) for i in inside)
        assert not (step.tokens[0, 3 + len(now) // 4 * 4 + 4 :] != MASK).any()
        shown, edited = now, edited + len(inside)
    assert edited > 0
    none = blockdiff.generate(model, prompts, edit_threshold=0.0, threshold=0.3, **wish)
    assert none.tokens == blockdiff.generate(model, prompts, threshold=0.3, **wish).tokens


@EVERY
def test_a_row_of_a_network_told_the_time_or_of_ar_is_itself_in_a_batch(given):
    for settings in ({"block_size": 4, "time_conditioning": True}, {"causal": True}):
        model = tiny_model(vocab_size=9, length=24, **settings).eval()
        prompts = [[1, 2, 3], [4], [5, 1, 0, 2, 3]]
        options = SamplingOptions(max_new_tokens=9, stop="none", seed=2, **given)
        if settings.get("causal") and options.sampler == "editing":
            with pytest.raises(InputError, match="the editing sampler asks how probable"):
                generate_tokens(model, prompts, options)
            continue
        both = generate_tokens(model, prompts, options)
        for row, prompt in enumerate(prompts):
            assert generate_tokens(model, [prompt], options, [row]).tokens[0] == both.tokens[row]
        if settings.get("causal"):  # one token at a time, whatever the order
            plain = SamplingOptions(max_new_tokens=9, stop="none", seed=2)
            assert generate_tokens(model, prompts, plain).tokens == both.tokens


@EVERY
@pytest.mark.parametrize("name", ["sdar_block4", "fast_dllm_v2_block8", "wedlm_qwen2_block4"])
def test_a_released_model_in_every_order(name, given, tmp_path_factory):
    model = released(name, tmp_path_factory)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
    wish = {"max_new_tokens": 9, "seed": 3, "stop": "none", **given}
    if name.startswith("wedlm") and "edit_threshold" in given:
        with pytest.raises(InputError, match="the editing sampler asks how probable"):
            blockdiff.generate(model, prompts, **wish)
        return
    both = blockdiff.generate(model, prompts, **wish)
    for row, prompt in enumerate(prompts):
        alone = blockdiff.generate(model, [prompt], rows=[row], **wish)
        assert (alone.tokens[0], alone.nfe[0]) == (both.tokens[row], both.nfe[row])


_OPENED = {}


def released(name, folders):
    if name not in _OPENED:
        config, weights, io = read_golden(f"released/{name}")
        folder = write(folders.mktemp(name) / "model", config, weights)
        _OPENED[name] = blockdiff.load_model(folder, **said(name, io))
    return _OPENED[name]


def test_sedd_reads_its_scores_as_logits_but_is_not_edited():
    model = tiny_model(vocab_size=9, block_size=12, time_conditioning=True, score=True).eval()
    done = blockdiff.generate(model, [[1, 2]], threshold=0.5, max_new_tokens=8, stop="none")
    assert len(done.tokens[0]) == 8
    with pytest.raises(InputError, match="the editing sampler asks how probable"):
        blockdiff.generate(model, [[1, 2]], edit_threshold=0.5, max_new_tokens=8)


@EVERY
def test_the_host_waits_once(given):
    engine = Engine(model_of("block")[0].eval())
    for prompt, options in rows_for("block", given):
        engine.admit(prompt, options)
    engine.step()
    while engine.active:
        before = engine.waits
        with Operators() as seen:
            engine.step()
        assert seen.waits() == [] and engine.waits == before + 1


def test_random_remasking_one_by_one_is_first_hitting():
    model = model_of("block")[0]
    wish = {"max_new_tokens": 20, "seed": 4, "stop": "none"}
    found = blockdiff.generate(model, [[1], [2, 3]], remasking="random", **wish)
    assert found.tokens == blockdiff.generate(model, [[1], [2, 3]], **wish).tokens


def test_one_step_fixes_a_block_and_one_token_a_step_takes_as_many():
    model = model_of("block")[0]
    for given, evaluations in (({"steps": 1}, 5), ({"steps": 2}, 10), ({"threshold": 1.0}, 20)):
        done = blockdiff.generate(model, [[1, 2, 3, 4]], max_new_tokens=20, stop="none", **given)
        assert done.nfe == [evaluations + 1]


def test_what_is_final_does_not_change_and_a_row_stops_at_final_tokens():
    """Under editing, too; a stopping rule is asked of blocks that are final."""
    model = model_of("block")[0]
    options = SamplingOptions(max_new_tokens=20, seed=1, **GIVEN["editing, all of it"])
    shown, edited = [], 0
    for step in stream_tokens(model, [[1, 2, 3]], options):
        now = step.final(0, 3, MASK)
        assert now[: len(shown)] == shown
        shown, edited = now, edited + int(step.edited.sum())
    assert shown == step.tokens[0, 3 : step.lengths[0]].tolist() and edited > 0
