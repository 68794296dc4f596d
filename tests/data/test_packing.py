import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from blockdiff.data import encoding, packing
from blockdiff.data.packing import StreamedWindows, Windows, pack
from blockdiff.data.tokenizers import add_mask_token, train_tokenizer
from blockdiff.errors import InputError
from helpers import largest_file

DOCUMENTS = ["the cat sat on the mat\n", "zwölf 🙂 世界, and the dog", "x", "the end\n" * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


def word_level(size=6, **special) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", "b", "c"])}
    vocabulary |= {f"w{i}": i for i in range(6, size)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def ids_of(document, tokenizer) -> list[int]:
    return tokenizer(document, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def stream_of(windows) -> list[int]:
    return torch.cat([window["x_0"] for window in windows]).tolist()


def is_empty(folder: Path) -> bool:
    return not folder.exists() or not list(folder.iterdir())


class Rereadable:
    """Documents whose second reading (the one that is encoded) does something first."""

    def __init__(self, documents, on_second_reading):
        self.documents = documents
        self.action = on_second_reading
        self.readings = 0

    def __iter__(self):
        self.readings += 1
        for number, document in enumerate(self.documents):
            if self.readings == 2 and number == len(self.documents) - 1:
                self.action()
            yield document


# -- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_windows_across_documents_are_the_concatenation(tokenizer, tmp_path, bos, eos):
    end = tokenizer.eos_token_id
    expected = []
    for document in DOCUMENTS:
        expected += [end] * bos + ids_of(document, tokenizer) + [end] * eos
    windows = pack(DOCUMENTS, tokenizer, length=8, bos=bos, eos=eos, cache_dir=tmp_path)
    assert isinstance(windows, torch.utils.data.Dataset)
    assert len(windows) == len(expected) // 8
    assert stream_of(windows) == expected[: len(windows) * 8]
    assert windows[0].keys() == {"x_0"}
    assert windows[0]["x_0"].dtype == torch.int64 and windows[0]["x_0"].shape == (8,)
    assert (windows.length, windows.tokens) == (8, len(windows) * 8)
    assert windows.corpus_tokens == len(expected)
    assert (tmp_path / windows.key / "ids.bin").stat().st_size == windows.tokens * 2
    assert windows.bytes == sum(len(document.encode()) for document in DOCUMENTS)


def test_windows_give_the_text_back(tokenizer, tmp_path):
    windows = pack(DOCUMENTS, tokenizer, length=1, eos=False, cache_dir=tmp_path)
    assert tokenizer.decode(stream_of(windows)) == "".join(DOCUMENTS)


def test_windows_of_single_documents_are_padded_and_marked(tokenizer, tmp_path):
    end = tokenizer.eos_token_id
    windows = pack(
        [*DOCUMENTS, ""], tokenizer, length=8, across_documents=False, cache_dir=tmp_path
    )
    position = 0
    for document in [*DOCUMENTS, ""]:
        left = [*ids_of(document, tokenizer), end]
        while left:
            item = windows[position]
            real, left = left[:8], left[8:]
            padding = 8 - len(real)
            assert item["x_0"].tolist() == real + [end] * padding
            assert item["documents"].tolist() == [0] * len(real) + [-1] * padding
            assert item["documents"].dtype == torch.int64
            position += 1
    assert position == len(windows)
    assert windows.tokens == windows.corpus_tokens
    assert windows.tokens == sum(int((item["documents"] == 0).sum()) for item in windows)


@pytest.mark.parametrize("eos", [False, True])
def test_marked_windows_hold_the_text_between_their_marks(tmp_path, eos):
    """[CLS], length − 2 tokens of the concatenation, [SEP]; the tail is dropped."""
    words = word_level(cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
    documents = ["a b c", "a", "", "c c b a b", "b"]
    whole = [i for text in documents for i in [*ids_of(text, words), *([2] if eos else [])]]
    settings = {"length": 5, "eos": eos, "window_marks": True}
    windows = pack(documents, words, cache_dir=tmp_path, **settings)
    assert len(windows) == len(whole) // 3
    for i, window in enumerate(windows):
        assert window["x_0"].tolist() == [1, *whole[3 * i : 3 * i + 3], 2]
    streamed = StreamedWindows(documents, words, **settings)
    assert stream_of(streamed) == stream_of(windows)
    plain = pack(documents, words, length=5, eos=eos, cache_dir=tmp_path)
    assert plain.key != windows.key
    with pytest.raises(InputError, match="across_documents"):
        pack(documents, words, cache_dir=tmp_path, across_documents=False, **settings)
    with pytest.raises(InputError, match="at least 3"):
        pack(documents, words, cache_dir=tmp_path, **settings | {"length": 2})
    with pytest.raises(InputError, match=r"BOS|EOS"):
        pack(documents, word_level(), cache_dir=tmp_path, length=5, eos=False, window_marks=True)


def test_documents_without_tokens_take_no_window(tokenizer, tmp_path):
    options = {"eos": False, "across_documents": False, "cache_dir": tmp_path}
    assert len(pack(["", "ab", ""], tokenizer, length=4, **options)) == 1


def test_padding_is_the_pad_token_where_there_is_no_eos(tmp_path):
    padded = word_level(pad_token="[CLS]")
    options = {"length": 3, "eos": False, "across_documents": False, "cache_dir": tmp_path}
    assert pack(["a b"], padded, **options)[0]["x_0"].tolist() == [3, 4, 1]
    with pytest.raises(InputError, match="no EOS or padding token"):
        pack(["a b"], word_level(), **options)


def test_indices_behave_like_those_of_a_list(tokenizer, tmp_path):
    windows = pack(DOCUMENTS, tokenizer, length=8, cache_dir=tmp_path)
    assert torch.equal(windows[-1]["x_0"], windows[len(windows) - 1]["x_0"])
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_the_file_holds_every_id_of_the_vocabulary(tmp_path, size, dtype):
    windows = pack([f"a w{size - 1}"], word_level(size), length=2, eos=False, cache_dir=tmp_path)
    assert windows[0]["x_0"].tolist() == [3, size - 1]
    raw = np.fromfile(tmp_path / windows.key / "ids.bin", dtype)
    assert raw.tolist() == [3, size - 1]


def test_special_tokens_spelt_out_in_a_text_stay_text(tokenizer, tmp_path):
    text = "a <|mask|> and <|endoftext|> b"
    special = {tokenizer.mask_token_id, tokenizer.eos_token_id}
    assert special < set(tokenizer.encode(text))  # or there would be nothing to guard against
    windows = pack([text], tokenizer, length=1, eos=False, cache_dir=tmp_path)
    assert special.isdisjoint(stream_of(windows))
    assert tokenizer.decode(stream_of(windows)) == text


def test_a_text_that_still_gives_the_mask_is_refused(tmp_path):
    stubborn = word_level(mask_token="b")
    stubborn.backend_tokenizer.add_tokens([AddedToken("b", special=False)])
    for read in (
        lambda: pack(["a b c"], stubborn, length=1, eos=False, cache_dir=tmp_path),
        lambda: list(StreamedWindows(["a b c"], stubborn, length=1, eos=False)),
    ):
        with pytest.raises(InputError, match="encodes to the mask token 'b'"):
            read()
    assert is_empty(tmp_path)


@pytest.mark.parametrize("across_documents", [False, True])
def test_a_document_in_pieces_fills_the_windows_of_one(
    tokenizer, tmp_path, monkeypatch, across_documents
):
    """Memory is that of a piece, however long the document."""
    documents = ["the cat sat\non the mat,\nand the dog\n" * 30, "x", "the end\n" * 40]
    options = {"length": 16, "across_documents": across_documents, "bos": True}
    whole = pack(documents, tokenizer, cache_dir=tmp_path / "a", **options)
    monkeypatch.setattr(encoding, "_LONGEST_PIECE", 50)
    pieces = list(encoding.encode_pieces(documents, tokenizer, bos=True, eos=True))
    assert max(len(ids) for ids, _ in pieces) < 200 and len(pieces) > 10
    parts = pack(documents, tokenizer, cache_dir=tmp_path / "b", **options)
    for name in ("ids.bin", "real.bin"):
        one, other = (tmp_path / f / whole.key / name for f in "ab")
        assert one.read_bytes() == other.read_bytes(), name
    assert parts.corpus_tokens == whole.corpus_tokens


def test_a_long_document_is_cut_up_without_changing_its_ids(tokenizer, monkeypatch, tmp_path):
    text = "the cat sat\n\n  on the mat,\nand  the \n dog\nzwölf 🙂\n" * 40
    whole = ids_of(text, tokenizer)
    calls = []
    encode = encoding._ids_of
    monkeypatch.setattr(encoding, "_ids_of", lambda *a: (calls.append(a[0]), encode(*a))[1])
    monkeypatch.setattr(encoding, "_LONGEST_PIECE", 100)
    monkeypatch.setattr(encoding, "_BATCH", 300)
    windows = pack([text, "x"], tokenizer, length=1, eos=True, cache_dir=tmp_path)
    end = tokenizer.eos_token_id
    assert stream_of(windows) == [*whole, end, *ids_of("x", tokenizer), end]
    assert max(sum(map(len, texts)) for texts in calls) < 1100 < len(text)


def test_a_tokenizer_that_would_notice_a_cut_gets_the_whole_document(monkeypatch, tmp_path):
    class MarksBeginnings:
        """Stands for SentencePiece: every text begins with a token of its own."""

        mask_token_id = None

        def __call__(self, texts, **_):
            return {"input_ids": [[99, *text.encode()] for text in texts]}

    monkeypatch.setattr(encoding, "_LONGEST_PIECE", 10)
    text = "some words\nand more\nwords\n" * 9
    encoded = encoding.encode_pieces([text], MarksBeginnings(), bos=False, eos=False)
    assert [(ids.tolist(), ends) for ids, ends in encoded] == [([99, *text.encode()], True)]


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, -3])
def test_a_window_needs_a_token(tokenizer, tmp_path, length):
    with pytest.raises(InputError, match=f"`length` is {length}"):
        pack(DOCUMENTS, tokenizer, length=length, cache_dir=tmp_path)
    with pytest.raises(InputError, match=f"`length` is {length}"):
        StreamedWindows(DOCUMENTS, tokenizer, length=length)


@pytest.mark.parametrize("across_documents", [False, True])
@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_an_empty_corpus(tokenizer, tmp_path, documents, across_documents):
    options = {"across_documents": across_documents, "cache_dir": tmp_path}
    with pytest.raises(InputError, match="corpus is empty"):
        pack(documents, tokenizer, length=4, **options)
    assert is_empty(tmp_path)


def test_a_corpus_shorter_than_a_window_says_how_long_it_is(tokenizer, tmp_path):
    tokens = len(ids_of("some words", tokenizer)) + 1
    with pytest.raises(InputError, match=f"has {tokens} tokens, less than one window of 1000"):
        pack(["some words"], tokenizer, length=1000, cache_dir=tmp_path)
    assert is_empty(tmp_path)
    windows = pack(
        ["some words"], tokenizer, length=1000, across_documents=False, cache_dir=tmp_path
    )
    assert len(windows) == 1


def test_texts_without_tokens(tmp_path):
    silent = word_level()
    silent.backend_tokenizer.model = WordLevel({"a": 0}, unk_token="a")
    with pytest.raises(InputError, match="no tokens"):
        pack(["  "], silent, length=2, eos=False, cache_dir=tmp_path)


@pytest.mark.parametrize("kind", ["bos", "eos"])
def test_a_mark_the_tokenizer_does_not_have(tmp_path, kind):
    marks = {"bos": False, "eos": False, kind: True}
    with pytest.raises(InputError, match=f"`{kind}` is true.*no {kind.upper()} token"):
        pack(["a"], word_level(), length=1, cache_dir=tmp_path, **marks)
    with pytest.raises(InputError, match=f"`{kind}` is true"):
        StreamedWindows(["a"], word_level(), length=1, **marks)


def test_half_a_surrogate_pair(tokenizer, tmp_path):
    with pytest.raises(InputError, match="surrogate pair after 'before '"):
        pack(["before \ud800"], tokenizer, length=1, cache_dir=tmp_path)
    with pytest.raises(InputError, match="surrogate pair after 'before '"):
        list(StreamedWindows(["before \ud800"], tokenizer, length=1))


def test_a_cache_that_cannot_be_written(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot pack into .*BLOCKDIFF_CACHE"):
        pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path / "file")


# -- the cache ------------------------------------------------------------------------------------


def test_the_second_call_does_not_tokenise(tokenizer, tmp_path, monkeypatch):
    first = pack(iter(DOCUMENTS), tokenizer, length=8, cache_dir=tmp_path)
    monkeypatch.setattr(encoding, "_ids_of", lambda *_: pytest.fail("tokenised again"))
    second = pack(DOCUMENTS, tokenizer, length=8, cache_dir=tmp_path)
    assert stream_of(second) == stream_of(first)
    for name in ("key", "length", "tokens", "corpus_tokens", "bytes"):
        assert getattr(second, name) == getattr(first, name)
    assert [path.name for path in tmp_path.iterdir()] == [first.key]
    meta = json.loads((tmp_path / first.key / "meta.json").read_text())
    assert meta["settings"]["length"] == 8


def test_every_setting_has_its_own_key(tokenizer, tmp_path):
    default = {"length": 4, "cache_dir": tmp_path}
    keys = [
        pack(documents, which, **default | setting).key
        for documents, which, setting in [
            (DOCUMENTS, tokenizer, {}),
            (DOCUMENTS[:-1], tokenizer, {}),
            (DOCUMENTS[::-1], tokenizer, {}),
            # The same characters in other documents.
            ([DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]], tokenizer, {}),
            (DOCUMENTS, train_tokenizer(DOCUMENTS, 280), {}),
            (DOCUMENTS, tokenizer, {"length": 5}),
            (DOCUMENTS, tokenizer, {"bos": True}),
            (DOCUMENTS, tokenizer, {"eos": False}),
            (DOCUMENTS, tokenizer, {"across_documents": False}),
            (DOCUMENTS, tokenizer, {"window_marks": True}),
        ]
    ]
    assert len(set(keys)) == len(keys) == len(list(tmp_path.iterdir()))
    assert pack(list(DOCUMENTS), tokenizer, **default).key == keys[0]


def test_the_format_version_is_part_of_the_key(tokenizer, tmp_path, monkeypatch):
    before = pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path).key
    monkeypatch.setattr(packing, "_FORMAT_VERSION", -1)
    assert pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path).key != before


def test_the_cache_goes_where_the_environment_says(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    key = pack(DOCUMENTS, tokenizer, length=4).key
    assert (tmp_path / "cache" / key / "meta.json").is_file()
    monkeypatch.delenv("BLOCKDIFF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pack(DOCUMENTS, tokenizer, length=4)
    assert (tmp_path / "home" / ".cache" / "blockdiff" / key / "meta.json").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError])
def test_an_interruption_leaves_nothing(tokenizer, tmp_path, monkeypatch, error):
    monkeypatch.setattr(encoding, "_BATCH", 1)

    def interrupt():
        assert len(list(tmp_path.rglob("ids.bin"))) == 1  # it was under way
        raise error("stop")

    with pytest.raises(error, match="stop"):
        pack(Rereadable(DOCUMENTS, interrupt), tokenizer, length=4, cache_dir=tmp_path)
    assert is_empty(tmp_path)


def test_a_full_disk_leaves_nothing(tokenizer, tmp_path):
    refused = pytest.raises(InputError, match=f"cannot pack into {tmp_path}: File too large")
    with largest_file(1000), refused:
        pack(DOCUMENTS * 1000, tokenizer, length=4, cache_dir=tmp_path)
    assert is_empty(tmp_path)


def test_of_two_that_race_the_second_takes_the_entry_of_the_first(tokenizer, tmp_path):
    winners = []

    def overtake():
        winners.append(pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path))

    loser = pack(Rereadable(DOCUMENTS, overtake), tokenizer, length=4, cache_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [loser.key]
    assert stream_of(loser) == stream_of(winners[0])


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGE = {
    "gone": None,
    "empty": lambda data: b"",
    "short": lambda data: data[:-1],
    "longer": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "one bit": flipped,
}
META_DAMAGE = {
    "null": lambda data: b"null",
    "a list": lambda data: b"[1]",
    "text": lambda data: b'"text"',
    "no UTF-8": lambda data: b"\xff" + data,
    "deep": lambda data: b"[" * 100_000,
    "nothing in it": lambda data: b"{}",
    "bytes": lambda data: data.replace(b'"bytes": ', b'"bytes": 1'),
    "tokens": lambda data: data.replace(b'"tokens": ', b'"tokens": 1'),
    "corpus": lambda data: data.replace(b'"corpus_tokens": ', b'"corpus_tokens": 1'),
    "windows": lambda data: data.replace(b'"windows": ', b'"windows": 0.'),
    "length": lambda data: data.replace(b'"length": 4', b'"length": 2'),
    "type": lambda data: data.replace(b'"<u2"', b'"<i2"'),
    "wrong type": lambda data: data.replace(b'"<u2"', b"null"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("meta.json", "ids.bin", "real.bin") for kind in DAMAGE]
    + [("meta.json", kind) for kind in META_DAMAGE],
)
def test_a_damaged_entry_is_packed_again(tokenizer, tmp_path, name, kind):
    options = {"length": 4, "across_documents": False, "cache_dir": tmp_path}
    first = pack(DOCUMENTS, tokenizer, **options)
    expected = [item["x_0"].tolist() + item["documents"].tolist() for item in first]
    facts = {key: value for key, value in vars(first).items() if not key.startswith("_")}
    damaged = tmp_path / first.key / name
    whole = damaged.read_bytes()
    change = {**DAMAGE, **META_DAMAGE}[kind]
    damaged.unlink()
    if change is not None:
        assert change(whole) != whole
        damaged.write_bytes(change(whole))
    again = pack(DOCUMENTS, tokenizer, **options)
    assert [item["x_0"].tolist() + item["documents"].tolist() for item in again] == expected
    assert {key: value for key, value in vars(again).items() if not key.startswith("_")} == facts
    assert [path.name for path in tmp_path.iterdir()] == [first.key]
    assert damaged.read_bytes() == whole


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a link to a folder"])
def test_what_lies_in_an_entrys_place_makes_room(tokenizer, tmp_path, kind):
    first = pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path / "a")
    entry = tmp_path / "b" / first.key
    entry.parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    if kind == "a file":
        entry.touch()
    else:
        entry.symlink_to(tmp_path / ("elsewhere" if "folder" in kind else "nothing"))
    again = pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path / "b")
    assert stream_of(again) == stream_of(first)
    assert (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize("change", ["a letter", "a document more", "one less", "another seam"])
def test_a_corpus_that_changes_between_its_readings_is_not_cached(tokenizer, tmp_path, change):
    documents = list(DOCUMENTS)

    class Changing:
        readings = 0

        def __iter__(self):
            self.readings += 1
            if self.readings == 2:
                if change == "a letter":
                    documents[0] = documents[0].replace("cat", "dog")
                elif change == "a document more":
                    documents.append("another")
                elif change == "one less":
                    documents.pop()
                else:
                    documents[:2] = [documents[0][:-1], documents[0][-1] + documents[1]]
            yield from documents

    with pytest.raises(InputError, match="changed while it was read"):
        pack(Changing(), tokenizer, length=4, cache_dir=tmp_path)
    assert is_empty(tmp_path)


@pytest.mark.parametrize("value", ["s3://bucket/cache", "~/cache", "~no-such-user/x", "a\udcff"])
def test_a_cache_that_can_be_none_is_refused_before_the_corpus_is_read(
    tokenizer, monkeypatch, value
):
    def unknown(*_):
        raise KeyError

    class Unread:
        def __iter__(self):
            pytest.fail("it was read")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setenv("BLOCKDIFF_CACHE", value)
    with pytest.raises(InputError, match="BLOCKDIFF_CACHE"):
        pack(Unread(), tokenizer, length=4)
    monkeypatch.delenv("BLOCKDIFF_CACHE")
    with pytest.raises(InputError, match=r"HOME is not set.* BLOCKDIFF_CACHE"):
        pack(Unread(), tokenizer, length=4)


def test_a_message_names_the_text_it_is_about(tokenizer, tmp_path):
    for texts, words in ((["few words"], r"has \d+ tokens"), ([""], "is empty")):
        with pytest.raises(InputError, match=f"^the text held out .*{words}"):
            options = {"cache_dir": tmp_path, "name": "the text held out"}
            pack(texts, tokenizer, length=100, **options)


def test_progress_goes_to_stderr_only(tokenizer, tmp_path, capsys):
    windows = pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    shown = pack(DOCUMENTS, tokenizer, length=4, cache_dir=tmp_path / "b", progress=True)
    assert capsys.readouterr().out == ""
    assert stream_of(shown) == stream_of(windows)


@pytest.mark.parametrize("documents", [["the cat sat\n" * 400], ["the cat sat\n" * 4] * 100])
def test_progress_counts_text_not_documents(tokenizer, tmp_path, monkeypatch, documents):
    """One document may be all the corpus."""
    steps = []

    def counted(batches, description, total):
        for batch in batches:
            steps.append(total)
            yield batch

    monkeypatch.setattr(encoding, "track", counted)
    monkeypatch.setattr(encoding, "_LONGEST_PIECE", 100)
    monkeypatch.setattr(encoding, "_BATCH", 500)
    pack(documents, tokenizer, length=4, cache_dir=tmp_path, progress=True)
    assert 5 <= len(steps) <= steps[0] <= len(steps) * 1.3


# -- workers and streams --------------------------------------------------------------------------


@pytest.mark.parametrize("across_documents", [False, True])
def test_windows_pickle_without_their_data(tokenizer, tmp_path, monkeypatch, across_documents):
    monkeypatch.chdir(tmp_path)
    options = {"across_documents": across_documents, "cache_dir": Path("cache")}
    windows = pack(DOCUMENTS * 100, tokenizer, length=8, **options)
    data = pickle.dumps(windows)
    assert len(data) < 1500 < windows.tokens
    monkeypatch.chdir("/")  # a worker may start elsewhere
    copy = pickle.loads(data)
    assert isinstance(copy, Windows)
    assert len(copy) == len(windows)
    for index in (0, len(copy) - 1):
        assert copy[index].keys() == windows[index].keys()
        assert all(torch.equal(copy[index][name], windows[index][name]) for name in copy[index])


def test_windows_load_in_workers(tokenizer, tmp_path):
    windows = pack(DOCUMENTS, tokenizer, length=4, across_documents=False, cache_dir=tmp_path)
    batches = list(DataLoader(windows, batch_size=4, num_workers=2))
    assert torch.cat([b["x_0"] for b in batches]).flatten().tolist() == stream_of(windows)
    assert batches[0]["documents"].shape == (4, 4)


@pytest.mark.parametrize("marks", [{}, {"bos": True}, {"eos": False}])
def test_a_stream_gives_the_windows_that_packing_gives(tokenizer, tmp_path, monkeypatch, marks):
    monkeypatch.setattr(encoding, "_BATCH", 10)
    packed = pack(DOCUMENTS, tokenizer, length=8, cache_dir=tmp_path, **marks)
    stream = StreamedWindows(DOCUMENTS, tokenizer, length=8, **marks)
    assert stream.length == 8
    for _ in range(2):
        windows = list(stream)
        assert windows[0]["x_0"].dtype == torch.int64
        assert stream_of(windows) == stream_of(packed)


def test_a_stream_is_read_no_further_than_needed(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH", 10)

    def endless():
        while True:
            yield "the cat sat on the mat"

    windows = iter(StreamedWindows(endless(), tokenizer, length=8))
    assert [len(next(windows)["x_0"]) for _ in range(5)] == [8] * 5


def test_stream_workers_share_the_documents(tokenizer):
    documents = [chr(ord("a") + i) * 3 for i in range(20)]
    stream = StreamedWindows(documents, tokenizer, length=1, eos=False)
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(stream_of(loader)) == sorted(stream_of(stream))


def test_a_stream_that_ends_too_soon(tokenizer):
    with pytest.raises(InputError, match="ended after 2 tokens, before one window of 50"):
        list(StreamedWindows(["x"], tokenizer, length=50))
    once = StreamedWindows(iter(["x" * 10]), tokenizer, length=2)
    assert list(once)
    with pytest.raises(InputError, match="read only once"):
        list(once)


def test_a_tokenizer_given_a_mask_later_packs_the_same_text(tmp_path):
    plain = word_level(eos_token="[SEP]")
    before = pack(["a b c"], plain, length=2, cache_dir=tmp_path)
    after = pack(["a b c"], add_mask_token(plain), length=2, cache_dir=tmp_path)
    assert stream_of(before) == stream_of(after)
    assert before.key != after.key
