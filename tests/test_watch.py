import io
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.models.dit import DiT, DiTConfig
from blockdiff.sampling.generate import stream_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step
from blockdiff.watch import watch

BLOCK = 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat", "the dog sat"] * 20, 300)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.encode(text) for text in ("<|endoftext|>the cat", "a dog sat on the mat")]


@pytest.fixture(scope="module")
def steps(tokenizer, prompts):
    torch.manual_seed(0)
    config = DiTConfig(
        vocab_size=len(tokenizer),
        length=32,
        block_size=BLOCK,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        cond_size=8,
        eos_token_id=tokenizer.eos_token_id,
    )
    options = SamplingOptions(max_new_tokens=20, seed=3)
    return list(stream_tokens(DiT(config), prompts, options))


def a_step(tokenizer, text: str, masked: list[int], fresh: list[int], length: int = -1) -> Step:
    ids = torch.tensor([tokenizer.encode(text)])
    ids[0, masked] = tokenizer.mask_token_id
    fixed = torch.zeros_like(ids, dtype=torch.bool)
    fixed[0, fresh] = True
    first = torch.zeros(1, dtype=torch.int64)
    return Step(ids, fixed, torch.tensor([7]), torch.tensor([length]), first > 0, first)


def show(
    steps, tokenizer, prompt_lengths, *, terminal: bool, env=None, drawn=None, **size: int
) -> str:
    file = io.StringIO()
    size = {"width": 80, "height": 24} | size
    console = Console(
        file=file,
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        _environ={"TERM": "xterm"} | (env or {}),
        **size,
    )
    last = watch(
        steps, tokenizer, prompt_lengths, tokenizer.mask_token_id, BLOCK, console, **(drawn or {})
    )
    assert last is steps[-1]
    return file.getvalue()


def test_no_terminal_gets_the_texts_alone(steps, tokenizer, prompts):
    plain = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    plain |= {127: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
    texts = [
        tokenizer.decode(row[: int(length)], skip_special_tokens=True).translate(plain)
        for row, length in zip(steps[-1].tokens, steps[-1].lengths, strict=True)
    ]
    shown = show(steps, tokenizer, [len(row) for row in prompts], terminal=False)
    assert shown.expandtabs(8) == "\n\n".join(texts).expandtabs(8) + "\n"
    assert "\x1b" not in shown


def test_text_cannot_drive_the_terminal(tokenizer):
    step = a_step(tokenizer, "the \x1b[31mcat\x07\x9b", [], [2], length=12)
    for terminal in (False, True):
        shown = show([step], tokenizer, [1], terminal=terminal)
        assert "\x1b[31m" not in shown
        assert "\x07" not in shown
        assert "\x9b" not in shown
        assert "␛[31mcat" in shown


def test_markup_in_the_text_stays_text(tokenizer):
    text = "the [bold]cat[/bold] [/]"
    step = a_step(tokenizer, text, [], [2], length=len(tokenizer.encode(text)))
    for terminal in (False, True):
        assert text in show([step], tokenizer, [99], terminal=terminal).replace("\x1b[1m", "")


def test_terminal_draws_the_current_block(tokenizer):
    text = "the cat sat on the mat the dog sat"
    assert len(tokenizer.encode(text)) == 9
    # Blocks 0-3, 4-7 and 8-11: position 4 is open, so positions from 8 on are not drawn.
    going = a_step(tokenizer, text, [4, 6, 8], [5])
    done = a_step(tokenizer, text, [], [], length=9)
    shown = show([going, done], tokenizer, [1], terminal=True)
    first = shown.split(" evaluations")[0]
    assert "\x1b[1mthe\x1b[0m cat sat on" in first
    assert "\x1b[2m░\x1b[0m\x1b[30;43m mat\x1b[0m\x1b[2m░\x1b[0m dog" in first
    assert first.count("░") == 2
    assert "the cat sat on the mat the dog sat" in shown.replace("\x1b[1mthe\x1b[0m", "the")
    assert "7 evaluations · 8 tokens" in shown


def test_without_colour_fresh_tokens_are_reversed(tokenizer):
    step = a_step(tokenizer, "the cat sat on the mat the dog sat", [4, 6, 8], [5])
    shown = show([step], tokenizer, [1], terminal=True, env={"NO_COLOR": "1"})
    first = shown.split(" evaluations")[0]
    assert "\x1b[7m mat\x1b[0m" in first
    assert not re.search(r"\x1b\[(?:\d+;)*[34]\d", shown), "no colour"


def test_end_of_text_tokens(tokenizer):
    text = "<|endoftext|>the cat<|endoftext|>"
    step = a_step(tokenizer, text, [], [], length=4)
    shown = show([step], tokenizer, [2], terminal=True)
    at_the_end = " cat\x1b[2m<|endoftext|>"
    assert at_the_end in shown
    assert "<|endoftext|>" not in shown.replace(at_the_end, "")


def test_a_last_block_that_is_edited_is_drawn(tokenizer):
    step = a_step(tokenizer, "the cat sat", [], [])
    edited = torch.zeros_like(step.fixed)
    edited[0, 1] = True
    steps = [replace(step, edited=edited), a_step(tokenizer, "the cat sat", [], [], length=3)]
    assert "\x1b[30;43m cat" in show(steps, tokenizer, [1], terminal=True)


@pytest.mark.parametrize("rows", [1, 5])
def test_frames_fit_the_terminal(tokenizer, rows):
    text = "the cat sat on the mat\n" * 40
    size = len(tokenizer.encode(text))
    going = a_step(tokenizer, text, [size - 1], [5])
    done = a_step(tokenizer, text, [], [], length=size)
    steps = [
        Step(*(x.repeat_interleave(rows, 0) for x in vars(step).values() if x is not None))
        for step in (going, done)
    ]
    shown = show(steps, tokenizer, [1] * rows, terminal=True, height=12)
    # Rich moves the cursor up over a frame before it draws the next.
    frame = shown.split("\x1b[1A")[0]
    assert "evaluations" in frame
    assert frame.count("\n") < 12
    assert ("and 2 more" in frame) == (rows == 5)
    assert shown.count("the cat sat on the mat") >= 39 * rows  # the prompt is bold in one


def test_an_ar_prompt_may_hold_the_mask_s_id(tokenizer):
    step = a_step(tokenizer, "the cat sat", [0], [2], length=3)
    assert "░" not in show([step], tokenizer, [1], terminal=True)


def test_a_reply_is_drawn_alone_and_leaves_nothing(tokenizer):
    text = "the cat sat on the mat the dog sat"
    steps = [a_step(tokenizer, text, [5, 6], [4]), a_step(tokenizer, text, [], [5], length=9)]
    shown = show(steps, tokenizer, [3], terminal=True, drawn={"reply": True})
    first, last = shown.split("evaluations")[0], shown.split("tokens per evaluation")[-1]
    assert "the cat" not in shown and "│\x1b[0m on" in first and first.count("░") == 2
    assert last.count("\x1b[1A\x1b[2K") == 4 and last.endswith("\x1b[2K"), "the frame is wiped"
    assert show(steps, tokenizer, [3], terminal=False, drawn={"reply": True}) == ""


@pytest.mark.parametrize(("grid", "boxes"), [("absolute", 3), ("prompt_end", 2)])
def test_the_block_that_is_drawn_is_the_models(tokenizer, grid, boxes):
    """Of the masked positions 5 to 8: to the end of block 4–7, or of 3–6 behind a prompt of 3."""
    text = "the cat sat on the mat the dog sat"
    steps = [a_step(tokenizer, text, [5, 6, 7, 8], [4]), a_step(tokenizer, text, [], [], length=9)]
    shown = show(steps, tokenizer, [3], terminal=True, drawn={"prompt_grid": grid})
    assert shown.split("evaluations")[0].count("░") == boxes


def test_no_steps():
    tokenizer = train_tokenizer(["the cat"], 258)
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        with pytest.raises(InputError, match="no steps"):
            watch([], tokenizer, [1], tokenizer.mask_token_id, BLOCK, console)
