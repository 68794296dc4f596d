"""`blockdiff chat`: through a pipe, in a terminal, and what the model is asked each time."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from blockdiff import cli, conversation
from blockdiff.chat import HELP, _typed_lines
from blockdiff.conversation import Answer, Conversation
from blockdiff.data.chat_templates import PLAIN, ChatTemplate
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError
from blockdiff.models.hub import save_model
from blockdiff.models.loading import adapt_folder
from blockdiff.printing import printable
from blockdiff.sampling.generate import stream_tokens
from blockdiff.sampling.options import SamplingOptions
from blockdiff.sampling.step import Step
from helpers import tiny_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer():
    text = "Hello? Hi! The law of the land. User: Assistant: system user assistant naïve ☕ "
    words = train_tokenizer([text * 20], 300)
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")]
    words.add_tokens(marks, special_tokens=True)
    words.chat_template = CHATML
    return words


def end_of(words):
    return words.convert_tokens_to_ids("<|im_end|>")


def make_model(words, end=0.0, length=256, **settings):
    """`end`: how much likelier the end of the turn is; no answer ends by EOS."""
    model = tiny_model(
        vocab_size=len(words), length=length, mask_token_id=words.mask_token_id,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, **settings,
    )  # fmt: skip
    with torch.no_grad():
        model.output.linear.bias[words.eos_token_id] -= 90
        model.output.linear.bias[words.convert_tokens_to_ids("<|im_start|>")] -= 90
        model.output.linear.bias[end_of(words)] += end
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = make_tokenizer()
    save_model(make_model(words, end=4.0), folder, words)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every prompt."""
    prompts: list[list[int]] = []

    def noted(model, ids, options, rows):
        prompts.extend(ids)
        return stream_tokens(model, ids, options, rows)

    monkeypatch.setattr(conversation, "stream_tokens", noted)
    return prompts


def piped(monkeypatch: pytest.MonkeyPatch, text: str | bytes, *words: object) -> None:
    content = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    cli.main(["chat", *map(str, words)])


def chatml(*said: tuple[str, str]) -> str:
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
    return turns + "<|im_start|>assistant\n"


# through a pipe


def test_each_line_is_a_message_and_the_answers_are_part_of_the_next(
    folder: Path, monkeypatch, capsys, asked
) -> None:
    lines = "Hello?\r\n\n/system Be kind.\n/reset of what?\nHi!\n/reset\nThe law\n/exit\nunread\n"
    piped(monkeypatch, lines, folder, "--json", "--max-new-tokens", 16, "--system", "Hi")
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert len(found) == 4 and all(one["role"] == "assistant" for one in found)
    names = ["role", "content", "nfe", "tokens", "tokens_per_nfe", "seconds", "finish", "dropped"]
    assert all(sorted(one) == sorted(names) for one in found)
    assert {one["finish"] for one in found} <= {"stop", "length"}
    assert all(1 <= one["tokens"] <= 16 and one["seconds"] > 0 for one in found)
    words = make_tokenizer()
    kind = ("system", "Be kind.")
    first, second, *_ = (("assistant", one["content"]) for one in found)
    said = [
        chatml(("system", "Hi"), ("user", "Hello?")),
        chatml(kind, ("user", "Hello?"), first, ("user", "/reset of what?")),
        chatml(kind, ("user", "Hello?"), first, ("user", "/reset of what?"), second,
               ("user", "Hi!")),
        chatml(kind, ("user", "The law")),
    ]  # fmt: skip
    assert [words.decode(ids) for ids in asked] == said
    assert "the system says: Be kind." in printed.err and "a new conversation" in printed.err


def test_an_answer_ends_with_its_turn(folder: Path, monkeypatch, capsys) -> None:
    words = [folder, "--max-new-tokens", 100]
    piped(monkeypatch, "Hello?\n" * 3, *words, "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["finish"] for one in found] == ["stop"] * 3
    assert max(one["tokens"] for one in found) < 100
    assert not any("<|im_end|>" in one["content"] for one in found)
    assert len({one["content"] for one in found}) > 1, "asked again it answers anew"
    # The same seed gives the same conversation, printed plainly too.
    piped(monkeypatch, "Hello?\n" * 3, *words)
    said = "".join(printable(one["content"]) + "\n" for one in found)
    assert capsys.readouterr().out == said
    piped(monkeypatch, "Hello?\n" * 3, *words, "--seed", 1)
    assert capsys.readouterr().out != said


def test_without_a_template_lines_are_plain_and_that_is_said(
    folder: Path, tmp_path: Path, monkeypatch, capsys, asked
) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    piped(monkeypatch, "Hello?\n", bare, "--max-new-tokens", 8)
    err = capsys.readouterr().err
    (line,) = [one for one in err.splitlines() if "no chat template" in one]
    assert "--chat-template" in line
    words = make_tokenizer()
    assert words.decode(asked[0]) == "<|endoftext|>User: Hello?\nAssistant:"
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    for source in (bare, folder):
        piped(monkeypatch, "Hello?\n", source, "--chat-template", tmp_path / "mine.jinja")
        assert words.decode(asked[-1]) == "[Hello?]"
        assert "no chat template" not in capsys.readouterr().err


def test_special_tokens_in_a_message_are_text(folder: Path, monkeypatch, capsys, asked) -> None:
    piped(monkeypatch, "Say <|mask|><|im_end|>\n", folder, "--max-new-tokens", 4)
    words = make_tokenizer()
    assert asked[0].count(end_of(words)) == 1 and words.mask_token_id not in asked[0]
    assert "Say <|mask|><|im_end|><|im_end|>" in words.decode(asked[0])


def test_the_oldest_turns_are_left_out_and_that_is_told(
    folder: Path, monkeypatch, capsys, asked
) -> None:
    lines = "".join(f"{number} the law of the land\n" * 1 for number in range(9))
    piped(monkeypatch, lines, folder, "--system", "Be kind.", "--json", "--max-new-tokens", 60)
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    told = [line for line in printed.err.splitlines() if "left out from now on" in line]
    assert len(told) == sum(one["dropped"] > 0 for one in found) >= 2
    words = make_tokenizer()
    before, questions = 0, 0
    for number, (ids, one) in enumerate(zip(asked, found, strict=True)):
        text = words.decode(ids)
        assert len(ids) + 60 <= 256 and text.startswith("<|im_start|>system\nBe kind.<|im_end|>")
        first = int(re.findall(r"user\n(\d)", text)[0])
        assert first == before + one["dropped"], "they stay left out"
        before, questions = first, questions + text.count("<|im_start|>user")
        assert f"{number} the law of the land<|im_end|>" in text
    assert questions > 9 and before > 0


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ("Hi " * 200, [], r"takes \d+ tokens .* lower --max-new-tokens"),
        ("Hello?", ["--system", "Hi " * 300], r"takes \d+ tokens"),
        ("Hello?", ["--chat-template", "nowhere.jinja"], "--chat-template nowhere.jinja: No such"),
        ("Hello?", ["--chat-template", "."], "--chat-template .: Is a directory"),
        ("Hello?", ["--chat-template", "{folder}/config.json"], "leaves out what a user says"),
        ("Hello?", ["--chat-template", "{bad}"], "the chat template cannot write the conversation"),
        ("Hello?", ["--temperature", "-1"], "--temperature is -1.0"),
        ("Hello?", ["--stop", "full"], "--stop: no rule 'full'"),
        ("Hello?", ["--delay", "-1"], "--delay"),
        (b"Hi\nM\xfcller\n", [], "standard input, line 2: not valid UTF-8"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, tmp_path: Path, monkeypatch, capsys, lines, options, words
) -> None:
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m }")
    options = [one.format(folder=folder, bad=tmp_path / "bad.jinja") for one in options]
    with pytest.raises(SystemExit) as stop:
        piped(monkeypatch, lines, folder, "--max-new-tokens", "8", *options)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("blockdiff: error: ") and re.search(words, line)


def test_a_template_without_a_system_keeps_the_conversation(tmp_path: Path) -> None:
    words = make_tokenizer()
    words.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    ) + CHATML
    talk = Conversation(make_model(words), words, ChatTemplate(words), SamplingOptions(4))
    reply = talk.ask("Hello?")
    list(reply)
    talk.keep(reply)
    before = list(talk.messages)
    with pytest.raises(InputError, match="no system"):
        talk.instruct("Be kind.")
    assert talk.messages == before and len(before) == 2


# models of every kind


@pytest.mark.parametrize("kind", ["ar", "mdlm", "adapted", "plain causal LM"])
def test_every_model_that_opens_can_be_talked_with(
    kind: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    words = make_tokenizer()
    source = tmp_path / "model"
    if kind in ("ar", "mdlm"):
        settings = {"causal": True, "block_size": 1} if kind == "ar" else {"block_size": 64}
        save_model(make_model(words, length=64, **settings), source, words)
    else:
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
            eos_token_id=[words.eos_token_id, end_of(words)], bos_token_id=words.bos_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(source)
        words.save_pretrained(source)
        if kind == "adapted":
            adapt_folder(source, tmp_path / "adapted", block_size=4)
            source = tmp_path / "adapted"
    piped(monkeypatch, "Hi!\nHello?\n" * 2, source, "--max-new-tokens", 12, "--json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 4 and all(1 <= one["tokens"] <= 12 for one in found)


def test_the_ends_are_those_of_template_and_configurations() -> None:
    words = make_tokenizer()
    model = make_model(words)
    model.generation_config.eos_token_id = [words.eos_token_id, 5]
    talk = Conversation(model, words, ChatTemplate(words), SamplingOptions())
    assert talk.ends == {end_of(words), words.eos_token_id, 5}


# an answer while it is written


def steps_of(words, prompt, text, order):
    """Steps that fix the text's tokens in this order; the last one ends it."""
    ids = torch.tensor([prompt + words.encode(text, add_special_tokens=False)])
    masked = torch.ones_like(ids, dtype=torch.bool)
    masked[:, : len(prompt)] = False
    first = torch.zeros(1, dtype=torch.int64)
    for count, place in enumerate(order, start=1):
        masked[0, len(prompt) + place] = False
        length = ids.shape[1] if count == len(order) else -1
        tokens = torch.where(masked, words.mask_token_id, ids)
        yield Step(tokens, ~masked, first + count, first + length, first > 0, first)


@pytest.mark.parametrize("order", [1, 7])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        (" The naïve ☕ law\nUser: Hi", "The naïve ☕ law"),
        (" law \nUse", "law \nUse"),
        ("law\n", "law"),
    ],
)
def test_what_is_shown_never_changes(monkeypatch, text: str, content: str, order: int) -> None:
    """No half character, no half of what ends the turn, and in the end the whole."""
    words = make_tokenizer()
    talk = Conversation(
        make_model(words), words, ChatTemplate(words, PLAIN), SamplingOptions(max_new_tokens=90)
    )
    size = len(words.encode(text, add_special_tokens=False))
    places = sorted(range(size), key=lambda i: (i // 8, i * order % 8))
    monkeypatch.setattr(
        conversation, "stream_tokens", lambda model, ids, *_: steps_of(words, ids[0], text, places)
    )
    reply = talk.ask("Hello?")
    shown = [reply.text() for _ in reply]
    assert all(after.startswith(before) for before, after in pairwise(shown))
    assert not any("\ufffd" in one for one in shown)
    assert shown[-1] == content and talk.keep(reply).content == content
    assert len(set(shown)) > size // 8, "it comes bit by bit"


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_is_written() -> None:
    words = make_tokenizer()
    options = SamplingOptions(max_new_tokens=60, seed=1)
    talk = Conversation(make_model(words, end=-90.0), words, ChatTemplate(words), options)
    reply = talk.ask("Hello?")
    assert talk.keep(reply).finish == "interrupted" and talk.messages == [], "before a word"
    reply = talk.ask("Hello?")
    for number, _ in enumerate(reply):
        if number == 30:
            break
    answer = talk.keep(reply)
    assert answer.finish == "interrupted" and 0 < answer.tokens < 60 and answer.content
    assert [one["role"] for one in talk.messages] == ["user", "assistant"]
    again = talk.ask("Hi!")
    assert answer.content in words.decode(again.prompt)
    list(again)
    assert talk.keep(again).finish == "length" and len(talk.messages) == 4


# in a terminal


class Person:
    """Types into a chat in a terminal of 80 columns and reads what is there."""

    def __init__(self, *words: object) -> None:
        self.hand, other = pty.openpty()
        command = [sys.executable, "-m", "blockdiff", "chat", *map(str, words)]
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.program = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=env, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)
        self.seen, self.read = "", 0

    def sees(self, text: str, seconds: float = 120.0) -> str:
        """What was printed since it last looked, up to this text, which must come."""
        end = time.monotonic() + seconds
        while (place := self.seen.find(text, self.read)) < 0:
            assert time.monotonic() < end, self.seen[self.read :]
            if select.select([self.hand], [], [], 0.2)[0]:
                try:
                    new = os.read(self.hand, 2**16)
                except OSError:  # it is closed
                    new = b""
                assert new, self.seen[self.read :]
                self.seen += new.decode(errors="replace")
        before, self.read = self.seen[self.read : place], place + len(text)
        return before

    def types(self, keys: str) -> None:
        os.write(self.hand, keys.encode())


def test_a_person_talks_with_it_in_a_terminal(tmp_path: Path) -> None:
    words = make_tokenizer()
    save_model(make_model(words, end=-90.0), tmp_path, words)
    # Slow enough for Ctrl-C to come before the end on a busy machine.
    person = Person(tmp_path, "--max-new-tokens", 24, "--delay", 0.05, "--show-denoising")
    try:
        # The folder's name decides where the line is broken.
        first = re.sub(r"\x1b\[[\d;]*m", "", person.sees("> ")).split()
        assert "block size 4, context of 256 tokens" in " ".join(first)
        person.types("/help\n")
        assert "/system TEXT" in person.sees("> ")
        person.types("/sytem\n")
        assert "did you mean /system?" in person.sees("> ")
        person.types("Hello?\n")
        person.sees("░")
        person.sees("tokens per evaluation")
        assert "24 tokens" in person.sees("not finished")
        person.sees("> ")
        person.types("/denoising\n")
        assert "not shown" in person.sees("> ")
        person.types("Hello?\n")
        assert "░" not in person.sees("not finished")
        person.sees("> ")
        person.types("/denoising\n")
        person.sees("> ")
        person.types("Hello?\n")
        person.sees("2 tokens")
        person.types("\x03")
        assert "\x1b[?25h" in person.sees("stopped"), "the cursor is back"
        person.sees("> ")
        person.types("\x1b[A")  # the line before, by readline
        person.sees("Hello?")
        person.types("\x15\x04")
        assert person.program.wait(timeout=60) == 0
        assert "Traceback" not in person.seen
    finally:
        person.program.kill()
        person.program.wait()
        os.close(person.hand)


def test_ctrl_c_at_an_empty_line_tells_how_to_leave(monkeypatch) -> None:
    """In a terminal the moment at which readline waits for it cannot be told from outside."""
    typed = iter(
        [KeyboardInterrupt, "Hello?", UnicodeDecodeError("utf-8", b"", 0, 1, ""), EOFError]
    )

    def read(prompt: str) -> str:
        found = next(typed)
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr("builtins.input", read)
    told: list[str] = []
    assert list(_typed_lines(told.append)) == ["Hello?"]
    assert "Ctrl-D or /exit ends the chat" in told[0] and "not valid UTF-8" in told[1]


def test_the_page_names_what_is_printed_and_typed() -> None:
    page = (Path(__file__).parents[1] / "docs" / "chat.md").read_text(encoding="utf-8")
    keys = {"role", *(field.name for field in fields(Answer))}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == keys
    for command in re.findall(r"/\w+", HELP):
        assert f"`{command}" in page
