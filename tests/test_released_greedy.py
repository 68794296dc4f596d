"""Published decoding: the greedy texts that the families' own generators give, token for token.

golden/released holds them, with how many forward passes they took. Each family's rule is one of our
orders with settings; what else it takes (the grid, the shift, how steps share the tokens) are
conventions of the model that `load_model` knows.
"""

import numpy as np
import pytest
import torch

import blockdiff
from blockdiff.errors import InputError
from blockdiff.sampling.options import translated
from blockdiff.sampling.orders.confidence import shares
from helpers import read_golden, tiny_model
from test_released import opener, write

THRESHOLD = object()  # the file's own
# (file, key) → the settings, in the family's words where we take them. `steps`: those of a block.
CASES = {
    ("sdar_block4", "static"): {"remasking_strategy": "low_confidence_static",
                                "denoising_steps": 4},
    ("sdar_block4", "dynamic"): {"remasking_strategy": "low_confidence_dynamic",
                                 "confidence_threshold": THRESHOLD, "denoising_steps": 4},
    ("sdar_block4", "dynamic_top_k1"): {"threshold": 0.0},  # after a cut to one all are certain
    ("a2d_qwen3_block4", "row0"): {"remasking": "low_confidence", "steps_per_block": 2},
    ("a2d_qwen3_block4", "row1"): {"remasking": "low_confidence", "steps_per_block": 2},
    ("fast_dllm_v2_block8", "0_t1"): {"threshold": 1.0, "small_block_size": 4},
    ("fast_dllm_v2_block8", "0_thr"): {"threshold": THRESHOLD, "small_block_size": 4},
    ("fast_dllm_v2_block8", "1_t1"): {"threshold": 1.0, "small_block_size": 4},
    ("fast_dllm_v2_block8", "1_thr"): {"threshold": THRESHOLD, "small_block_size": 4},
    ("llada2_moe_block4", "t95"): {"threshold": 0.95, "steps": 4},
    ("llada2_moe_block4", "thr"): {"threshold": THRESHOLD, "steps": 4},
    ("llada2_moe_block4", "half_steps"): {"threshold": 0.95, "steps": 2},
    ("llada_mha", "one_block"): {"remasking": "low_confidence", "steps": 12},
    ("llada_mha", "blocks4"): {"remasking": "low_confidence", "steps": 2, "block_length": 4},
    ("dream", "maskgit_plus"): {"alg": "maskgit_plus", "steps": 12},
    ("dream", "entropy"): {"alg": "entropy", "steps": 12},
    ("dream", "topk_margin"): {"alg": "topk_margin", "steps": 12},
    ("setdlms_bd3lm_s4", "t1_aligned"): {"confidence_threshold": 1.0},
    ("setdlms_bd3lm_s4", "thr_aligned"): {"confidence_threshold": THRESHOLD},
    ("wedlm_qwen2_block4", "t0"): {"sampler": "confidence"},  # their threshold 0 is the best alone
    ("wedlm_qwen2_block4", "thr"): {"confidence_threshold": THRESHOLD},
}  # fmt: skip
# Families that keep no cache while they write: theirs has no pass that reads the prompt alone.
FRESH = ("llada2_moe_block4", "wedlm_qwen2_block4")
IDS = ["-".join(case) for case in CASES]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return opener(tmp_path_factory)


def given(name, key, io):
    """(prompt, new tokens, settings, forward passes) as the published generator had them."""
    if name.startswith("a2d"):
        row = int(key[-1])
        prompt = io["prompts"][row, : io["prompt_lens"][row]].tolist()
    else:
        prompt = io[f"prompt{key[0]}" if name.startswith("fast") else "prompt"][0].tolist()
    text = io[f"greedy{key}" if name.startswith("fast") else f"greedy_{key}"][0].tolist()
    if name.startswith("a2d"):  # padded on the left to whole blocks, and written whole
        text = text[-len(prompt) - int(io["max_new_tokens"]) :]
    if name.startswith("llada2"):
        text = prompt + text
    assert text[: len(prompt)] == prompt
    settings = {k: float(io["threshold"]) if v is THRESHOLD else v
                for k, v in CASES[name, key].items()}  # fmt: skip
    passes = io.get(f"greedy{'' if name.startswith('fast') else '_'}{key}_forwards",
                    io.get("greedy_forwards"))  # fmt: skip
    return prompt, text[len(prompt) :], settings | {"temperature": 0.0}, int(passes)


@pytest.mark.parametrize(("name", "key"), CASES, ids=IDS)
def test_the_published_text(name, key, opened):
    model, io = opened(name)
    prompt, text, settings, passes = given(name, key, io)
    done = blockdiff.generate(model, [prompt], max_new_tokens=len(text), **settings)
    assert done.tokens == [text]
    assert done.nfe[0] <= passes + (name in FRESH)


@pytest.mark.parametrize(("name", "key"), CASES, ids=IDS)
def test_beside_others_and_streamed(name, key, opened):
    """A row is its own: with prompts of other lengths, and one that has begun already."""
    model, io = opened(name)
    prompt, text, settings, _ = given(name, key, io)
    options = blockdiff.SamplingOptions(max_new_tokens=len(text), **translated(settings))
    engine = blockdiff.Engine(model)
    engine.admit_all([prompt[:3], prompt + prompt], options)
    for _ in range(4):
        engine.step()
    row = engine.admit(prompt, options)
    seen = {}
    while engine.active:
        step = engine.step()
        place = step.rows.tolist().index(row)
        for at in step.fixed[place].nonzero().flatten().tolist():
            assert at not in seen
            seen[at] = int(step.tokens[place, at])
    end = int(step.lengths[place])
    assert [seen[at] for at in range(len(prompt), end)] == text


@pytest.mark.parametrize("key", ["t1", "thr"])
def test_rows_that_ran_one_by_one_as_a_batch(key, opened):
    model, io = opened("fast_dllm_v2_block8")
    rows = [given("fast_dllm_v2_block8", f"{i}_{key}", io) for i in (0, 1)]
    longest = max(len(text) for _, text, *_ in rows)
    done = blockdiff.generate(
        model, [prompt for prompt, *_ in rows], max_new_tokens=longest, **rows[0][2]
    )
    for found, (_, text, *_) in zip(done.tokens, rows, strict=True):
        assert found[: len(text)] == text


def test_a_batch_that_was_padded_on_the_left(opened):
    """Their own batch: one grid for all, anchored at the prompts' end, padding not seen."""
    model, io = opened("a2d_qwen3_block4")
    prompts = [io["prompts"][i, :n].tolist() for i, n in enumerate(io["prompt_lens"])]
    done = blockdiff.generate(model, prompts, max_new_tokens=16, steps=2, temperature=0.0)
    for found, prompt, theirs in zip(done.tokens, prompts, io["greedy"].tolist(), strict=True):
        assert prompt + found == theirs[-len(prompt) - 16 :]
    assert max(done.nfe) <= int(io["greedy_forwards"])


class LeftToRight(blockdiff.Order):
    """SDAR's `sequential`, of one token a step."""

    name = "left_to_right"

    def choose(self, logits, wanted, rows):
        first = wanted & (wanted.cumsum(1) == 1)
        return torch.from_numpy(first[wanted]), rows.draw(logits, wanted)


def test_an_order_of_one_s_own(opened):
    model, io = opened("sdar_block4")
    prompt, theirs = (io[key][0].tolist() for key in ("prompt", "greedy_sequential_top_k1"))
    done = blockdiff.generate(
        model, [prompt], max_new_tokens=len(theirs) - len(prompt), sampler=LeftToRight(),
        temperature=0.0,
    )  # fmt: skip
    assert prompt + done.tokens[0] == theirs
    assert done.nfe[0] <= int(io["greedy_sequential_top_k1_forwards"])


# how steps share a block's tokens


def test_shares_of_a_number_of_steps():
    assert shares(10, 4, "first") == (3, 3, 2, 2)
    assert shares(3, 5, "first") == (1, 1, 1)
    # What dllm's own function gives: halves go where float32 puts them.
    assert shares(32, 10, "rounded") == (3, 3, 3, 3, 3, 3, 3, 4, 3, 4)
    assert shares(4, 3, "rounded") == (1, 1, 2)
    assert shares(11, 9, "rounded") == (1, 1, 1, 1, 1, 1, 2, 2, 1)
    # Nothing is due in the first step, as noise ends at 0.001, and two tokens in the last.
    assert shares(12, 12, "last") == (1,) * 10 + (2,)
    assert shares(512, 256, "last") == (1, *(2,) * 254, 3)
    for remainder in ("first", "rounded", "last"):
        for tokens in (1, 5, 16):
            for steps in (1, 3, 16, 40):
                found = shares(tokens, steps, remainder)
                assert sum(found) == tokens and min(found) >= 1 and len(found) <= steps


def test_dllm_s_shares(opened):
    model, io = opened("a2d_qwen3_block4")
    prompt = io["prompts"][0, : io["prompt_lens"][0]].tolist()
    steps = blockdiff.stream(model, [prompt], max_new_tokens=4, steps=3, stop="none")
    assert [int(step.fixed.sum()) for step in steps] == [0, 1, 1, 2]


# parts of a block


def test_rows_with_parts_and_without_side_by_side(opened):
    model, io = opened("llada_mha")
    engine, texts = blockdiff.Engine(model), []
    for key in ("one_block", "blocks4"):
        prompt, text, settings, _ = given("llada_mha", key, io)
        engine.admit(prompt, blockdiff.SamplingOptions(max_new_tokens=12, **translated(settings)))
        texts.append(prompt + text)
    while engine.active:
        step = engine.step()
    assert step.tokens.tolist() == texts


@pytest.mark.parametrize("settings", [{"steps": 3}, {"sampler": "first_hitting", "seed": 3}])
def test_a_whole_text_is_written_in_parts(settings):
    """Only positions of the part are fixed, parts come from the left, counted from the prompt."""
    model = tiny_model(length=16, block_size=16)
    parts, prompt = [], [1, 2, 0]
    for step in blockdiff.stream(
        model, [prompt], max_new_tokens=11, block_size=4, stop="none", **settings
    ):
        at = step.fixed[0].nonzero().flatten()
        (part,) = set(((at - 3) // 4).tolist())
        parts.append((part, len(at)))
    ones = [(0, 1)] * 4 + [(1, 1)] * 4 + [(2, 1)] * 3
    by_steps = [(0, 2), (0, 1), (0, 1), (1, 2), (1, 1), (1, 1), (2, 1), (2, 1), (2, 1)]
    assert parts == (by_steps if "steps" in settings else ones)


def test_steps_of_small_blocks_behind_a_first_token_alone(opened):
    model, io = opened("fast_dllm_v2_block8")
    fixed = []
    for step in blockdiff.stream(
        model, [io["prompt0"][0].tolist()], max_new_tokens=11, sub_block=4, steps=3,
        temperature=0.0, stop="none",
    ):  # fmt: skip
        at = step.fixed[0].nonzero().flatten()
        fixed.append((len(at), *set((at // 4).tolist())))
    # Of the block that the prompt begins 3 are left, of the next the first is not among the steps.
    ones = [(1, 1)] * 3 + [(1, 2)] * 4
    assert fixed == [*ones, (2, 3), (1, 3), (1, 3)]


def test_a_part_as_large_as_the_text_is_none():
    model = tiny_model(vocab_size=50, length=16, block_size=16)
    wish = {"max_new_tokens": 9, "stop": "none", "seed": 5}
    whole = blockdiff.generate(model, [[1, 2]], **wish).tokens
    assert blockdiff.generate(model, [[1, 2]], block_size=9, **wish).tokens == whole
    assert blockdiff.generate(model, [[1, 2]], block_size=3, **wish).tokens != whole


@pytest.mark.parametrize("kind", [{"block_size": 16}, {"block_size": 4}])
def test_parts_by_an_obvious_loop(kind):
    """Greedy, one at a time: the surest of the part, from the whole block with masks behind it."""
    model = tiny_model(vocab_size=9, length=16, **kind)
    size, mask = kind["block_size"], model.config.mask_token_id
    prompt, new = [1, 2, 0, 3], 12
    text = torch.tensor([prompt + [mask] * new])
    for begin in range(4, 16, 2):
        block = slice(begin // size * size, begin // size * size + size)
        for _ in range(2):
            x_0 = text if size < 16 else None
            logits = model(text, x_0).logits[0, block]
            logits[:, mask] = -torch.inf
            sure, token = logits.softmax(-1).max(-1)
            at = torch.arange(16)[block]
            here = (at >= begin) & (at < begin + 2) & (text[0, block] == mask)
            best = int(torch.where(here, sure, -1).argmax())
            text[0, at[best]] = token[best]
    part = {"block_size": 2} if size == 16 else {"sub_block": 2}
    done = blockdiff.generate(
        model, [prompt], max_new_tokens=new, sampler="confidence", temperature=0.0, stop="none",
        **part,
    )  # fmt: skip
    assert done.tokens[0] == text[0, 4:].tolist()


def test_a_network_told_the_time_hears_of_the_masks_behind_the_part(monkeypatch):
    model = tiny_model(length=16, block_size=16, time_conditioning=True)
    heard, decode = [], model.decode
    monkeypatch.setattr(
        model, "decode", lambda *a, sigma, **k: heard.append(sigma) or decode(*a, sigma=sigma, **k)
    )
    blockdiff.generate(model, [[1] * 4], max_new_tokens=12, block_size=4, stop="none")
    rate = 1 - torch.exp(-torch.cat(heard)).double()
    np.testing.assert_allclose(rate, np.arange(12, 0, -1) / 16, atol=2e-3)


def test_a_block_size_said_as_it_is_opened_is_that_of_the_parts(tmp_path):
    """As on the command line, where one word says both."""
    config, weights, io = read_golden("released/llada_mha")
    folder = write(tmp_path / "model", config, weights)
    prompt, text, settings, _ = given("llada_mha", "blocks4", io)
    del settings["block_length"]
    model = blockdiff.load_model(folder, block_size=4)
    assert blockdiff.generate(model, [prompt], max_new_tokens=12, **settings).tokens == [text]


def test_parts_that_are_none_are_refused():
    model = tiny_model(length=16, block_size=4)
    with pytest.raises(InputError, match="`sub_block` 5 is no part of a block of 4"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, sub_block=5)
    with pytest.raises(InputError, match="`sub_block` is 0"):
        blockdiff.generate(model, [[1]], max_new_tokens=2, sub_block=0)
    whole = tiny_model(length=16, block_size=16)
    with pytest.raises(InputError, match="`block_size` is 0"):
        blockdiff.generate(whole, [[1]], max_new_tokens=2, block_size=0)
    scores = tiny_model(length=16, block_size=16, score=True, time_conditioning=True)
    with pytest.raises(InputError, match="in one block"):
        blockdiff.generate(scores, [[1]], max_new_tokens=2, sub_block=4)
