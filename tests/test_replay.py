import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.models.dit import DiT, DiTConfig
from blockdiff.replay import Event, Recorder, Recording, text_pieces, write_page
from blockdiff.sampling.generate import stream_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step

CHROMIUM = shutil.which("chromium")
BLOCK = 4
NEVER = torch.zeros(1, dtype=torch.bool)
ROW = torch.tensor([0])


def record(
    steps: Iterable[Step], tokenizer: PreTrainedTokenizerFast, prompt_length: int,
    block_size: int, row: int = 0,
) -> Recording:  # fmt: skip
    """The recording of one row of steps that run to their end."""
    recorder = Recorder(tokenizer, prompt_length, block_size, row)
    for _ in recorder.follow(steps):
        pass
    return recorder.recording()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the naïve cat sat on the mat", "the dog ☕ sat"] * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
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
    return DiT(config)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.encode(text) for text in ("<|endoftext|>the cat", "a dog sat on the mat")]


@pytest.fixture(scope="module")
def steps(model, prompts):
    return list(stream_tokens(model, prompts, SamplingOptions(max_new_tokens=20, seed=3)))


def embedded(page: str) -> dict:
    """The recording as a browser would find it: up to the first end tag."""
    found = re.search(r'<script id="recording" type="application/json">(.*?)</script', page, re.S)
    return json.loads(found[1])


def finished(tokenizer, text: str, fixed_at: list[list[int]]) -> list[Step]:
    """Steps which fix the given positions of `text`, one list a step."""
    ids = torch.tensor([tokenizer.encode(text)])
    canvas = torch.full_like(ids, tokenizer.mask_token_id)
    new = {position for positions in fixed_at for position in positions}
    for position in set(range(ids.shape[1])) - new:
        canvas[0, position] = ids[0, position]
    steps = []
    for nfe, positions in enumerate(fixed_at, 1):
        fixed = torch.zeros_like(ids, dtype=torch.bool)
        fixed[0, positions] = True
        canvas = torch.where(fixed, ids, canvas)
        length = ids.shape[1] if nfe == len(fixed_at) else -1
        steps.append(Step(canvas, fixed, torch.tensor([nfe]), torch.tensor([length]), NEVER, ROW))
    return steps


@pytest.mark.parametrize("row", [0, 1])
def test_record_keeps_the_row(steps, tokenizer, prompts, row):
    recording = record(steps, tokenizer, len(prompts[row]), BLOCK, row=row)
    last, length = steps[-1], recording.length
    assert length == int(last.lengths[row])
    assert "".join(recording.tokens[:length]) == tokenizer.decode(last.tokens[row, :length])
    assert recording.text == tokenizer.decode(last.tokens[row, :length], skip_special_tokens=True)
    assert len(recording.events) == sum(bool(step.fixed[row].any()) for step in steps)
    assert recording.nfe == int(last.nfe[row])
    # Each new position is fixed exactly once, and nothing of the prompt.
    positions = sorted(p for event in recording.events for p in event.positions)
    assert positions == list(range(len(prompts[row]), len(recording.tokens)))
    numbers = [event.nfe for event in recording.events]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] <= recording.nfe


def test_what_was_edited_is_shown_as_it_was(tokenizer):
    first, last = finished(tokenizer, "the cat sat on", [[1, 2], [3]])
    wrong = first.tokens.clone()
    wrong[0, 1] = tokenizer.encode(" mat")[0]
    edited = torch.zeros_like(first.fixed)
    edited[0, 1] = True
    start, end = replace(first, tokens=wrong), replace(last, edited=edited)
    recording = record([start, end], tokenizer, 1, BLOCK)
    assert recording.tokens[1] == " cat" and recording.edits == [(2, 1, " mat")]
    assert [event.positions for event in recording.events] == [[1, 2], [3]]
    assert embedded(recording.page())["edits"] == [[2, 1, " mat"]]


def test_what_is_past_the_end_of_text_is_kept_apart(tokenizer):
    text = "the<|endoftext|> cat sat"
    *steps, last = finished(tokenizer, text, [[3], [1]])
    last.tokens[0, 2] = tokenizer.mask_token_id
    end = Step(last.tokens, last.fixed, last.nfe, torch.tensor([2]), NEVER, ROW)
    recording = record([*steps, end], tokenizer, 1, BLOCK)
    assert recording.length == 2
    assert recording.special == [1]
    assert recording.text == "the"
    assert recording.tokens == ["the", "<|endoftext|>", "", " sat"]


@pytest.mark.parametrize(
    "text", ["naïve café ☕ 👩‍🚀", "  two\n\n  lines\t", "the<|endoftext|>cat", "\ufffd\ufffdx"]
)
def test_pieces_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = text_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)


def test_pieces_of_bytes_that_are_no_text(tokenizer):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(len(tokenizer), (40,), generator=generator).tolist()
        assert "".join(text_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_pieces_give_a_split_character_to_its_last_token(tokenizer):
    ids = tokenizer.encode("👩")
    assert len(ids) == 4
    assert text_pieces(tokenizer, ids) == ["", "", "", "👩"]


def test_unfinished_row_is_refused(steps, tokenizer, prompts):
    recorder = Recorder(tokenizer, len(prompts[0]), BLOCK)
    with pytest.raises(InputError, match="row 0 is not finished"):
        recorder.recording()
    recorder.see(steps[0])
    with pytest.raises(InputError, match="row 0 is not finished"):
        recorder.recording()


@pytest.mark.parametrize("row", [0, 1])
def test_only_the_row_s_own_steps_count(steps, tokenizer, prompts, monkeypatch, row):
    clock = [0.0]
    monkeypatch.setattr("blockdiff.replay.time.perf_counter", lambda: clock[0])

    def slow():
        # The last one again, as for other rows that go on.
        for step in [*steps, steps[-1]]:
            clock[0] += 1.0
            yield step

    recorder = Recorder(tokenizer, len(prompts[row]), BLOCK, row)
    seen = []
    for step in recorder.follow(slow()):
        seen.append(step)
        clock[0] += 100.0
    assert seen == [*steps, steps[-1]]
    recording = recorder.recording()
    unfinished = sum(not bool(step.done[row]) for step in steps)
    assert recording.seconds == unfinished + 1
    new = recording.length - recording.prompt_length
    assert recording.tokens_per_second == new / recording.seconds


def test_page_holds_the_recording(steps, tokenizer, prompts, tmp_path: Path):
    recording = record(steps, tokenizer, len(prompts[0]), BLOCK)
    path = tmp_path / "new" / "page.html"
    write_page(recording, path, title="Title & <b>", subtitle="{{recording}}")
    page = path.read_text(encoding="utf-8")
    data = embedded(page)
    assert data["tokens"] == recording.tokens
    assert len(data["events"]) == len(recording.events)
    assert data["events"][0] == {
        "nfe": recording.events[0].nfe,
        "positions": recording.events[0].positions,
    }
    assert "<h1>Title &amp; &lt;b&gt;</h1>" in page
    assert '<p class="subtitle">{{recording}}</p>' in page


def test_page_asks_for_nothing_else(steps, tokenizer, prompts, tmp_path: Path):
    path = tmp_path / "page.html"
    write_page(record(steps, tokenizer, len(prompts[0]), BLOCK), path, title="t")
    page = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|@import|src=|url\(", page)


MEASURE = """<script>
const names = ["map", "slider", "play", "nfe", "fixed", "rate", "block", "speed", "text"];
const found = {};
for (const name of names) {
  const r = document.getElementById(name).getBoundingClientRect();
  found[name] = [r.left, r.top, r.right, r.bottom];
}
parent.postMessage(JSON.stringify({boxes: found, page: document.documentElement.scrollWidth}), "*");
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize("width", [380, 1200])
def test_controls_do_not_overlap(steps, tokenizer, prompts, tmp_path: Path, width):
    """As chromium lays it out, in a frame: its own windows are never as narrow as 380 pixels."""
    path = tmp_path / "page.html"
    write_page(record(steps, tokenizer, len(prompts[0]), BLOCK), path, title="A title of the page")
    page = path.read_text(encoding="utf-8")
    path.write_text(page.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        "<title></title><script>onmessage = e => { document.title = e.data }</script>"
        f'<iframe src="page.html" width="{width}" height="800" style="border: 0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900",
               "--virtual-time-budget=2000", frame.as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", dom)[1]))
    boxes = found["boxes"]
    assert found["page"] <= width
    for a, b in combinations(set(boxes) - {"map", "slider"}, 2):
        (left, top, right, bottom), (x, y, x_end, y_end) = boxes[a], boxes[b]
        apart = right <= x + 1 or x_end <= left + 1 or bottom <= y + 1 or y_end <= top + 1
        assert apart, (a, b, boxes[a], boxes[b])
    if width == 1200:
        assert boxes["play"][1] < boxes["text"][3] and boxes["play"][0] >= boxes["text"][2] - 1


def test_text_cannot_end_the_script(tmp_path: Path):
    text = "the </script><script>alert(1)</script> <!-- <script> \u2028 cat"
    recording = Recording(
        tokens=["the", text],
        special=[],
        prompt_length=1,
        length=2,
        block_size=BLOCK,
        events=[Event(1, [1])],
        nfe=1,
        seconds=1.0,
    )
    path = tmp_path / "page.html"
    write_page(recording, path, title="</title><script>alert(2)</script>")
    page = path.read_text(encoding="utf-8")
    assert embedded(page)["tokens"] == ["the", text]
    assert page.count("<script") == page.count("</script") == 2
    assert "<!-- <script" not in page


def test_blocks_begin_where_the_model_begins_them(tokenizer):
    """At the prompt's end the first block is short of `offset` positions."""
    for grid, length, offset in (("absolute", 5, 0), ("prompt_end", 5, 3), ("prompt_end", 8, 0)):
        assert Recorder(tokenizer, length, BLOCK, prompt_grid=grid).offset == offset
