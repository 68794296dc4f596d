"""Messages as tokens: templates of every kind, what ends an answer, what fits."""

import pytest
from tokenizers import AddedToken

from blockdiff.data.chat_templates import PLAIN, ChatTemplate, TurnEnd, read_template
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError

LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = train_tokenizer(["Hello? Hi! Bye. User: Assistant: " * 20], 270)
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")]
    words.add_tokens(marks, special_tokens=True)
    return words


def said(*texts):
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_a_prompt_is_the_templates_text_in_tokens(tokenizer):
    template = ChatTemplate(tokenizer, CHATML)
    ids = template.prompt([{"role": "system", "content": "Be kind."}, *said("Hello?")])
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2
    assert template.prompt(said("<|im_end|>")).count(end) == 1, "what is typed stays text"
    assert tokenizer.decode(template.prompt(said("<|im_end|>"))).count("<|im_end|>") == 2


def test_the_plain_template_begins_as_any_text_does(tokenizer):
    template = ChatTemplate(tokenizer, PLAIN)
    ids = template.prompt([{"role": "system", "content": "Be kind."}, *said("a", "b", "c")])
    assert tokenizer.decode(ids) == (
        "<|endoftext|>Be kind.\n\nUser: a\nAssistant: b\nUser: c\nAssistant:"
    )


@pytest.mark.parametrize(
    ("template", "mark", "text"),
    [
        (CHATML, "<|im_end|>", ""),
        (PLAIN, None, "\nUser:"),
        # an end of text behind the words of a turn, and the next turn's beginning as the end
        (LOOP + "[{{ m['role'] }}] {{ m['content'] }}\n<|endoftext|>\n{% endfor %}",
         "<|endoftext|>", ""),
        (LOOP + "<|im_start|>{{ m['role'] }} {{ m['content'] }}{% endfor %}", "<|im_start|>", ""),
        (LOOP + "{{ m['content'] }}\n\n{% endfor %}", None, "\n\n"),
        (CHATML.replace("|im_", "|"), None, "<|end|>"),  # no token of this tokenizer
        ("{{ messages[-1]['content'] }}", None, ""),
    ],
)  # fmt: skip
def test_what_ends_an_answer(tokenizer, template, mark, text):
    ids = frozenset() if mark is None else frozenset({tokenizer.convert_tokens_to_ids(mark)})
    assert ChatTemplate(tokenizer, template).turn_end == TurnEnd(ids, text)


def test_the_oldest_turns_give_way_and_the_system_message_stays(tokenizer):
    template = ChatTemplate(tokenizer, CHATML)
    system = {"role": "system", "content": "Be kind."}
    chat = [system, *said("Hello?", "Hi!", "Bye.", "Bye!", "Hello?")]
    whole = len(template.prompt(chat))
    assert template.fit(chat, whole) == (chat, template.prompt(chat))
    for room, left in ((whole - 1, chat[3:]), (len(template.prompt([system, chat[-1]])), chat[5:])):
        kept, ids = template.fit(chat, room)
        assert kept == [system, *left] and ids == template.prompt(kept) and len(ids) <= room
    with pytest.raises(InputError, match=r"takes \d+ tokens .* room for 9: shorten it"):
        template.fit(chat, 9)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{% if %}", "cannot write the conversation"),
        ("{{ raise_exception('no') }}", r"conversation 'Hello'\.\.\.: no"),
        ("name: not a template", "leaves out what a user says"),
    ],
)
def test_templates_that_are_none(tokenizer, template, words):
    with pytest.raises(InputError, match=words) as refused:
        ChatTemplate(tokenizer, template)
    assert "\n" not in str(refused.value)


def test_files_of_templates(tmp_path):
    (tmp_path / "chat.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    assert read_template(str(tmp_path / "chat.jinja")) == CHATML
    (tmp_path / "latin").write_bytes(b"M\xfcller")
    for wrong in ("nowhere", "latin", ""):
        with pytest.raises(InputError, match="`chat_template`"):
            read_template(str(tmp_path / wrong))
