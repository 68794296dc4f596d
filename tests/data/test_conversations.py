"""Conversations: rows, template, tokens, and where in a window they lie."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import AddedToken

from blockdiff.data.conversations import Conversations, pack_conversations, words_of
from blockdiff.data.corpora import load_corpus, split_documents
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.errors import InputError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As reasoning models have it: the thoughts of an answer that another question follows are gone.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not "
    "loop.last %}{{ m['content'].split('#')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Ciao, you"},
]


@pytest.fixture
def tokenizer():
    words = train_tokenizer(["Hello? Hi! Bye. Ciao, you. Be kind. " * 20], 270)
    marks = [AddedToken(mark, special=True) for mark in ("<|im_start|>", "<|im_end|>")]
    words.add_tokens(marks, special_tokens=True)
    words.chat_template = CHATML
    return words


def documents(words, told, block=1, grid="absolute", kind="chat"):
    """(decoded tokens, whether each counts, padding before them) of each document."""
    found = Conversations(words, kind, block, grid).documents(json.dumps(told))
    return [
        ([words.decode([token]) for token in ids],
         [any(a <= i < b for a, b in spans) for i in range(len(ids))], left)
        for ids, left, spans, _ in found
    ]  # fmt: skip


def counted(document):
    tokens, marks, _ = document
    return "".join(token for token, mark in zip(tokens, marks, strict=True) if mark)


# -- tokens ---------------------------------------------------------------------------------------


def test_what_counts_is_each_answer_with_its_end(tokenizer):
    """By hand, in ids: an AR model reads one document, in which both answers count."""
    (document,) = Conversations(tokenizer, "chat", 1, "absolute").documents(json.dumps(CHAT))

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def turn(role, text):
        return ids(f"<|im_start|>{role}\n{text}<|im_end|>\n")

    head = ids("<|im_start|>assistant\n")
    first = turn("system", "Be kind.") + turn("user", "Hello?") + head
    one, two = ids("Hi!<|im_end|>"), ids("Ciao, you<|im_end|>")
    second = ids("\n") + turn("user", "Bye.") + head
    assert document.ids == first + one + second + two
    begin = len(first) + len(one) + len(second)
    assert document.responses == [(len(first), len(first + one)), (begin, begin + len(two))]
    assert document.bytes == len("Hi!<|im_end|>Ciao, you<|im_end|>")


@pytest.mark.parametrize("grid", ["absolute", "prompt_end"])
def test_in_blocks_each_answer_is_a_document_that_ends_with_a_block(tokenizer, grid):
    both = documents(tokenizer, CHAT, 8, grid)
    assert len(both) == 2
    for (tokens, marks, left), answer in zip(both, ("Hi!", "Ciao, you"), strict=True):
        assert (left + len(tokens)) % 8 == 0
        text = counted((tokens, marks, left))
        assert text.startswith(answer + "<|im_end|>")
        assert text.replace("<|im_end|>", "") == answer
        assert marks[marks.index(True) :] == [True] * (len(marks) - marks.index(True))
        if grid == "prompt_end":
            assert (left + marks.index(True)) % 8 == 0 and left < 8
        else:
            assert left == 0
    assert "".join(both[1][0]).startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert "Hi!<|im_end|>\n<|im_start|>user" in "".join(both[1][0]), "the end comes once"


def test_a_template_that_forgets_thoughts_is_trained_as_it_is_sampled(tokenizer):
    tokenizer.chat_template = THINKING
    chat = [*CHAT[1:2], {"role": "assistant", "content": "kind?#Hi!"}, *CHAT[3:]]
    for block in (1, 4):
        first, second = documents(tokenizer, chat, block)
        assert counted(first).startswith("kind?#Hi!<|im_end|>")
        assert "kind?#" not in "".join(second[0])
        assert counted(second).startswith("Ciao, you<|im_end|>")


def test_a_pair_is_its_prompt_and_its_response(tokenizer):
    for block in (1, 4):
        ((tokens, marks, _),) = documents(tokenizer, ["Hello?", " Hi!"], block, kind="prompt")
        # Like a prompt that is sampled from, it begins with the token that begins a text.
        assert "".join(tokens).startswith("<|endoftext|>Hello? Hi!<|endoftext|>")
        text = counted((tokens, marks, 0))
        assert text.replace("<|endoftext|>", "") == " Hi!" and "<|endoftext|>" in text
    assert counted(documents(tokenizer, ["", "Hi"], kind="prompt")[0]) == "Hi<|endoftext|>"
    tokenizer.bos_token = tokenizer.eos_token = None  # with no such token the first has no loss
    tokenizer.sep_token = tokenizer.pad_token
    assert counted(documents(tokenizer, ["", "Hi"], kind="prompt")[0]) == "i<|endoftext|>"


def test_a_template_without_an_end_gets_the_tokenizers(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    )
    first, second = documents(tokenizer, CHAT)
    assert counted(first) == "assistant: Hi!<|endoftext|>", "it gives no beginning to answer to"
    assert "Hi!\nuser: Bye.\n" in "".join(second[0]) and "<|endoftext|>" not in second[0][:-1]


def test_special_tokens_spelt_out_in_a_message_stay_text(tokenizer):
    said = "Say <|im_end|>, <|mask|>"
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    ((tokens, marks, _),) = documents(tokenizer, chat)
    assert tokens.count("<|im_end|>") == 2 and "<|mask|>" not in tokens
    assert "".join(tokens).count(said) == 2
    assert counted((tokens, marks, 0)) == said + "<|im_end|>"


def test_an_answer_that_begins_a_conversation_counts(tokenizer):
    (document,) = documents(tokenizer, [{"role": "assistant", "content": "Hi!"}])
    assert counted(document) == "Hi!<|im_end|>"
    assert documents(tokenizer, CHAT[:2]) == []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "the tokenizer has no chat template; use one that has"),
        ("{{ raise_exception('no') }}", "cannot write the conversation 'Hello'...: no"),
        ("{% if %}", "cannot write the conversation 'Hello'"),
    ],
)
def test_a_template_that_is_none(tokenizer, template, said):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=said.replace(".", r"\.")) as error:
        Conversations(tokenizer, "chat", 4, "absolute")
    assert "\n" not in str(error.value)


def test_a_template_that_does_not_go_on_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(InputError, match="writes other words before an answer"):
        documents(tokenizer, CHAT)
    tokenizer.chat_template = CHATML + "{{ raise_exception('odd') if messages | length > 3 }}"
    with pytest.raises(InputError, match=r"conversation 'Be kind\.'\.\.\.: odd"):
        documents(tokenizer, CHAT)


# -- windows --------------------------------------------------------------------------------------


def packed(words, told, tmp_path, **options):
    options = {"format": "chat", "length": 64, "block": 4, "cache_dir": tmp_path, **options}
    return pack_conversations([json.dumps(one) for one in told], words, **options)


def test_documents_lie_in_windows_block_by_block(tokenizer, tmp_path):
    windows = packed(tokenizer, [CHAT, CHAT[1:3], CHAT[3:]] * 5, tmp_path, length=96)
    assert windows.conversations == {
        "conversations": 15, "responses": 20, "cut": 0, "left_out": 0, "empty": 0,
    }  # fmt: skip
    seen = 0
    for window in (windows[i] for i in range(len(windows))):
        blocks = window["documents"].view(-1, 4)
        assert bool((blocks == blocks[:, :1]).all()), "no block holds two documents"
        documents = window["documents"].unique()
        numbers = documents[documents >= 0].tolist()
        assert numbers == list(range(len(numbers)))
        assert not bool(window["maskable"][window["documents"] < 0].any())
        assert window["x_0"].dtype == torch.int64 and window["maskable"].dtype == torch.bool
        for number in documents[documents >= 0]:
            own = window["maskable"][window["documents"] == number]
            assert not own[0] and own[-1] and int(own.diff().sum()) == 1
            seen += 1
    assert seen == 20
    assert len(windows) < 20, "several share a window"
    assert windows.tokens == sum(int(windows[i]["maskable"].sum()) for i in range(len(windows)))
    again = packed(tokenizer, [CHAT, CHAT[1:3], CHAT[3:]] * 5, tmp_path, length=96)
    assert again.key == windows.key and again.conversations == windows.conversations
    assert packed(tokenizer, [CHAT] * 5, tmp_path, block=8).key != windows.key


def test_padding_before_a_prompt_is_no_document(tokenizer, tmp_path):
    windows = packed(tokenizer, [CHAT], tmp_path, prompt_grid="prompt_end", block=8)
    for window in (windows[i] for i in range(len(windows))):
        begins = window["maskable"].int().diff(prepend=torch.zeros(1, dtype=torch.int)) == 1
        assert all(place % 8 == 0 for place in begins.nonzero().flatten().tolist())


@pytest.mark.parametrize("block", [1, 4])
def test_what_does_not_fit_is_cut_or_left_out_and_counted(tokenizer, tmp_path, block):
    long = [CHAT[1], {"role": "assistant", "content": "Hi! " * 60}, *CHAT[3:]]
    windows = packed(tokenizer, [long, CHAT[:2], CHAT[1:3]], tmp_path, block=block)
    assert windows.conversations == {
        "conversations": 3, "responses": 3, "cut": 1, "left_out": 1, "empty": 1,
    }  # fmt: skip
    assert bool(windows[0]["maskable"][-1]), "to the end of the window"


def test_where_nothing_fits_it_is_one_line(tokenizer, tmp_path):
    with pytest.raises(
        InputError, match="no response that fits: of 2, the prompts alone fill `len"
    ):
        packed(tokenizer, [CHAT], tmp_path, length=8)
    with pytest.raises(InputError, match="no response in 1 conversations"):
        packed(tokenizer, [CHAT[:2]], tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_said_trains_a_tokenizer():
    told = [json.dumps(CHAT[1:3]), json.dumps(["2 + 2 =", " 4"])]
    assert list(words_of(told)) == ["Hello?", "Hi!", "2 + 2 =", " 4"]


# -- rows -----------------------------------------------------------------------------------------


def lines(tmp_path, *rows):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_rows_of_lines_and_tables_are_the_same(tmp_path):
    rows = [{"messages": CHAT, "id": 1}, {"messages": CHAT[1:3], "id": 2}]
    path = lines(tmp_path, *rows)
    found = list(load_corpus(path, format="chat"))
    assert [json.loads(one) for one in found] == [CHAT, CHAT[1:3]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    assert list(load_corpus(str(tmp_path / "chat.parquet"), format="chat")) == found
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    assert list(load_corpus(str(tmp_path / "saved"), format="chat")) == found
    renamed = lines(tmp_path, {"talk": CHAT})
    assert len(list(load_corpus(renamed, format="chat", text_column="talk"))) == 1


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "a", "response": "b"}, ["a", "b"]),
        ({"prompt": "a", "completion": "b", "n": 1}, ["a", "b"]),
        ({"question": "a", "answer": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": "", "output": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": "of c", "output": "b"}, ["a\n\nof c", "b"]),
    ],
)
def test_a_pair_goes_by_its_usual_names(tmp_path, row, pair):
    for path in (lines(tmp_path, row), str(tmp_path / "pair.parquet")):
        if path.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        assert [json.loads(one) for one in load_corpus(path, format="prompt")] == [pair]


BAD = {
    "role": ({"messages": [{"role": "bot", "content": "x"}]},
             "line 2: message 1 has the role 'bot'; known are system, user, assistant, tool"),
    "no role": ({"messages": [*CHAT, {"content": "x"}]}, "line 2: message 6 has no role and"),
    "words": ({"messages": ["Hello"]}, "line 2: message 1 has no role and content"),
    "content": ({"messages": [{"role": "user", "content": ["x"]}]}, "line 2: message 1 holds list"),
    "null": ({"messages": [{"role": "user", "content": None}]}, "line 2: message 1 holds NoneType"),
    "a list's role": ({"messages": [{"role": [], "content": "x"}]}, r"1 has the role \[\]; known"),
    "nothing": ({"messages": []}, "line 2: column 'messages' holds no messages"),
    "text": ({"messages": "Hello"}, "line 2: column 'messages' holds str, not a list"),
    "column": ({"text": "Hello"}, "line 2: no column 'messages'; it has 'text'"),
    "half a pair": ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 1: half a"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named(tmp_path, kind):
    row, said = BAD[kind]
    path = lines(tmp_path, {"messages": CHAT}, row)
    with pytest.raises(InputError, match=said) as error:
        list(load_corpus(path, format="chat"))
    assert "chat.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "line 1: no prompt with a response; it has 'prompt'"),
        ({"prompt": "a", "response": None}, "line 1: column 'response' holds NoneType"),
        ({"prompt": ["a"], "response": "b"}, "line 1: column 'prompt' holds list"),
        ({"instruction": "a", "input": 3, "output": "b"}, "line 1: column 'input' holds int"),
    ],
)
def test_a_bad_pair_is_named(tmp_path, row, said):
    with pytest.raises(InputError, match=said):
        list(load_corpus(lines(tmp_path, row), format="prompt"))


def test_plain_text_is_no_conversation(tmp_path):
    (tmp_path / "a.txt").write_text("Hello")
    for source in (str(tmp_path / "a.txt"), "pydoc"):
        with pytest.raises(InputError, match="plain text, which has no chat"):
            load_corpus(source, format="chat")


def test_a_conversation_is_never_cut_in_two(tmp_path):
    """Of texts as few as these each would give up its tail."""
    rows = [{"messages": CHAT}] * 4
    corpus = load_corpus(lines(tmp_path, *rows), format="chat")
    train, held = split_documents(corpus, 0.2, whole=True)
    assert len(list(train)) == 3 and len(list(held)) == 1
    assert all(json.loads(one) == CHAT for one in [*train, *held])
    with pytest.raises(InputError, match="too small to split"):
        split_documents(load_corpus(lines(tmp_path, *rows[:1]), format="chat"), whole=True)
