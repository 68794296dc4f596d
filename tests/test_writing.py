"""What `generate` shows: streamed text, what is left after Ctrl-C, prompts from everywhere."""

import io
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blockdiff import writing
from blockdiff.api import encode_prompts, generate
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError, RunStopped
from blockdiff.models.hub import save_model
from blockdiff.printing import plain_console, printable
from blockdiff.sampling.generate import stream_tokens
from blockdiff.sampling.options import SamplingOptions
from helpers import tiny_model
from test_api import sentence_piece, word_piece

TEXT = "The law of the land is the law, naïve ☕ 日本語. "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def byte_level():
    return train_tokenizer([TEXT] * 20, 300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    model = tiny_model(
        vocab_size=len(tokenizer), length=16, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    save_model(model, folder, tokenizer)
    return folder


def wish(**given: object) -> SimpleNamespace:
    names = {
        "prompt": None, "prompt_file": None, "samples": 1, "precision": "float32",
        "tokenizer": None, "compile": False, "watch": False, "delay": 0.0, "page": None,
        "json": False, "likelihood": False,
    }  # fmt: skip
    return SimpleNamespace(**{**names, **given})


@pytest.mark.parametrize("make", [byte_level, word_piece, sentence_piece])
@pytest.mark.parametrize("seed", range(3))
def test_streamed_text_is_the_text(make, seed: int) -> None:
    """In whatever order positions are fixed, and however a character's bytes are spread."""
    tokenizer = make()
    model = tiny_model(
        vocab_size=len(tokenizer), length=16, mask_token_id=tokenizer.mask_token_id, seed=seed
    )
    ids = [tokenizer.encode("the law", add_special_tokens=False)]
    file = io.StringIO()
    view = writing._Written(
        plain_console(file=file), tokenizer, ["the law"], ids, model.config.mask_token_id
    )
    options = SamplingOptions(max_new_tokens=24, seed=seed, stop="none")
    lengths = []
    for step in stream_tokens(model, ids, options):
        view.show(step)
        lengths.append(len(file.getvalue()))
    whole = generate(model, ids, tokenizer=tokenizer, options=options).texts[0]
    assert file.getvalue() == "the law" + printable(whole)
    assert len(set(lengths)) > 3, "it comes bit by bit"


@pytest.mark.parametrize(
    ("stream", "samples", "streamed"), [(Terminal, 1, True), (io.StringIO, 1, False),
                                        (Terminal, 2, False)]
)  # fmt: skip
def test_one_text_streams_on_a_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stream, samples: int, streamed: bool
) -> None:
    shown = []
    original = writing._Written.show
    monkeypatch.setattr(
        writing._Written,
        "show",
        lambda self, step, **more: (shown.append(step), original(self, step)),
    )
    monkeypatch.setattr(sys, "stdout", file := stream())
    options = SamplingOptions(max_new_tokens=8, stop="none")
    writing.write_texts(str(folder), wish(prompt="The law", samples=samples), options)
    assert (len(shown) > 4) == streamed
    assert file.getvalue().count("The law") >= samples


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("shown", [{}, {"samples": 2}, {"watch": True}, {"json": True}])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_signal_keeps_what_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, shown, stream
) -> None:
    def interrupted(model, ids, options):
        for count, step in enumerate(stream_tokens(model, ids, options)):
            if count == 6:
                signal.raise_signal(number)
            yield step

    monkeypatch.setattr(writing, "stream_tokens", interrupted)
    monkeypatch.setattr(sys, "stdout", file := stream())
    monkeypatch.setenv("TERM", "xterm")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunStopped, match=r"after [1-9][0-9]* tokens") as stopped:
        options = SamplingOptions(max_new_tokens=16, stop="none")
        writing.write_texts(str(folder), wish(prompt="The law", **shown), options)
    assert stopped.value.exit_code == 128 + number and "\n" not in str(stopped.value)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    if shown.get("json"):
        assert file.getvalue() == ""
    elif not (shown.get("watch") and stream is io.StringIO):
        text = file.getvalue()
        assert "law" in text and text.endswith("\n") and len(text) > len("The law\n"), (
            "its tokens too"
        )


def test_many_texts_tell_how_far_they_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []

    def advance(description: str, total: int, unit: str):
        from contextlib import nullcontext

        told.append((description, total, unit))
        return nullcontext(told.append)

    monkeypatch.setattr(writing, "advance", advance)
    options = SamplingOptions(max_new_tokens=5, stop="none")
    writing.write_texts(str(folder), wish(prompt="The law", samples=3), options)
    assert told[0] == ("Writing 3 texts", 15, "tokens") and sum(told[1:]) == 15


def test_the_summary_counts_the_making_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What --watch shows last and the summary are the same figures, delays left out."""
    clock = [0.0]

    def slept(seconds: float) -> None:
        clock[0] += seconds

    def counted() -> float:
        clock[0] += 0.125
        return clock[0]

    monkeypatch.setattr("blockdiff.watch.time", SimpleNamespace(perf_counter=counted, sleep=slept))
    monkeypatch.setattr(sys, "stdout", file := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    options = SamplingOptions(max_new_tokens=8, stop="none")
    writing.write_texts(str(folder), wish(watch=True, delay=100.0), options)
    last = [line for line in file.getvalue().splitlines() if "tokens/s" in line][-1]
    summary = capsys.readouterr().err
    speed = summary.split("evaluations, ")[1].split(" tokens/s")[0]
    assert f"8 tokens · {speed} tokens/s" in last and "8 tokens, " in summary
    assert float(speed) > 1


def test_json_keeps_the_prompt_of_every_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_bytes(b"one\ntwo\n")
    options = SamplingOptions(max_new_tokens=4)
    ask = wish(prompt_file=str(tmp_path / "p.txt"), samples=2, json=True)
    writing.write_texts(str(folder), ask, options)
    assert json.loads(capsys.readouterr().out)["prompts"] == ["one", "one", "two", "two"]


# prompts

SEPARATORS = ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"one\ntwo\r\n\n  \nthree", ["one", "two", "three"]),
        (b"\xef\xbb\xbfone\n", ["one"]),
        ("".join(f"a{x}b" for x in SEPARATORS).encode() + b"\n",
         ["".join(f"a{x}b" for x in SEPARATORS)]),
    ],
)  # fmt: skip
def test_prompt_files_split_at_line_feeds_only(
    tmp_path: Path, content: bytes, prompts: list[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert writing.read_prompts(None, str(path)) == prompts


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"one\nM\xfcller\n", "prompts.txt, line 2: not valid UTF-8"), (b"", "holds no prompt"),
     (b" \n\n", "holds no prompt"), (None, "cannot read"), ("folder", "cannot read")],
)  # fmt: skip
def test_prompt_files_that_are_none(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "prompts.txt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    with pytest.raises(InputError, match=words) as refused:
        writing.read_prompts(None, str(path))
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="exclude each other"):
        writing.read_prompts("a", str(path))


@pytest.mark.parametrize(
    ("content", "prompt"),
    [(b"one\ntwo\n", "one\ntwo"), (b"\xef\xbb\xbfone\r\n", "one"), (b"", ""), (b"--item\n\n",
      "--item\n")],
)  # fmt: skip
def test_a_dash_reads_standard_input_to_its_end(
    monkeypatch: pytest.MonkeyPatch, content: bytes, prompt: str
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content), closed=False))
    assert writing.read_prompts("-") == [prompt]


def test_standard_input_is_touched_for_a_dash_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert writing.read_prompts(None) == [""] and writing.read_prompts("null") == ["null"]
    with pytest.raises(InputError, match="no standard input"):
        writing.read_prompts("-")
    latin = SimpleNamespace(buffer=io.BytesIO(b"M\xfcller"), closed=False)
    monkeypatch.setattr(sys, "stdin", latin)
    with pytest.raises(InputError, match="standard input, line 1"):
        writing.read_prompts("-")


def test_prompts_are_encoded_as_they_are() -> None:
    tokenizer = byte_level()
    model = tiny_model(vocab_size=len(tokenizer), length=16)
    (row,) = encode_prompts(model, "[b]law[/b] $x", tokenizer)
    assert tokenizer.decode(row[1:]) == "[b]law[/b] $x" and torch.tensor(row).min() >= 0
