import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from blockdiff.data.corpora import Corpus, load_corpus, split_documents
from blockdiff.data.pydoc import _docstrings, pydoc_documents
from blockdiff.errors import InputError


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def write_parquet(path: Path, **columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def message_of(*args, **kwargs) -> str:
    """The one line a bad corpus ends in, whether at opening or while reading."""
    with pytest.raises(InputError) as caught:
        list(load_corpus(*args, **kwargs))
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- files ----------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_read_again_at_every_iteration(tmp_path):
    path = tmp_path / "naïve.txt"
    path.write_bytes("\ufefffirst\r\nzwölf 🙂\n".encode())
    corpus = load_corpus(str(path))
    assert isinstance(corpus, Corpus)
    assert corpus.name == str(path)
    assert list(corpus) == list(corpus) == ["first\r\nzwölf 🙂\n"]
    assert list(load_corpus(path)) == list(corpus)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_json_lines_skip_blank_lines_nulls_and_empty_texts(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    rows = [{"text": "one\n"}, {"text": ""}, {"text": None}, {"text": " \n"}, {"text": "zwölf 🙂"}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert list(load_corpus(str(path))) == ["one\n", "zwölf 🙂"]


def test_parquet_reads_the_column_asked_for(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["x", "y"], body=["b\nb", None])
    assert list(load_corpus(str(tmp_path / "a.parquet"))) == ["x", "y"]
    assert list(load_corpus(str(tmp_path / "a.parquet"), text_column="body")) == ["b\nb"]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_every_format_may_be_compressed(tmp_path, suffix, compress):
    write_parquet(tmp_path / "c.parquet", text=["table"])
    plain = {
        "a.txt": b"plain",
        "b.jsonl": b'{"text": "lines"}\n',
        "c.parquet": (tmp_path / "c.parquet").read_bytes(),
    }
    folder = tmp_path / "compressed"
    folder.mkdir()
    for name, data in plain.items():
        (folder / (name + suffix)).write_bytes(compress(data))
    assert list(load_corpus(str(folder))) == ["plain", "lines", "table"]


def test_folder_glob_and_several_files_come_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.md").write_text("no corpus file")
    assert list(load_corpus(str(tmp_path))) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(load_corpus(str(tmp_path / "*.txt"))) == ["a.txt", "b.txt"]
    assert list(load_corpus(str(tmp_path / "**/*.txt"))) == ["a.txt", "b.txt", "sub/c.txt"]
    several = load_corpus([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")])
    assert list(several) == ["b.txt", "a.txt"]
    assert several.name == f"{tmp_path / 'b.txt'}, {tmp_path / 'a.txt'}"


def test_a_file_whose_name_looks_like_a_glob_is_still_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("other")
    assert list(load_corpus(str(tmp_path / "a[1].txt"))) == ["one"]


@pytest.mark.parametrize(
    "source", ["gone.txt", "./gone", "/gone", "~/gone", "a/b/c", "gone.txt.xz"]
)
def test_what_looks_like_a_path_is_a_missing_file(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    assert message_of(source) == f"{source}: no such file or folder"


def test_files_that_are_no_corpus(tmp_path):
    (tmp_path / "a.md").write_text("text")
    for source in (tmp_path / "a.md", tmp_path, tmp_path / "*.md"):
        message = message_of(str(source))
        assert str(source) in message and ".jsonl" in message and ".xz" in message
    for nothing in ([], ""):
        assert "no corpus given" in message_of(nothing)


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    assert "holds no text" in message_of(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.txt", b"fine\nfine\nbad \xff", ["line 3", "UTF-8"]),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', ["line 2", "UTF-8"]),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', ["line 3", "not JSON"]),
        ("a.jsonl", b'{"text": "x"}\n["text"]\n', ["line 2", "not list"]),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', ["line 1", "'text'", "'body', 'id'"]),
        ("a.jsonl", b'{"text": 7}\n', ["line 1", "int"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
        ("a.parquet", b"no parquet", ["as parquet"]),
        ("a.txt.gz", b"no gzip", ["cannot read"]),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-12], ["cannot read"]),
        ("a.jsonl.xz", b"no xz", ["cannot read"]),
    ],
)
def test_a_faulty_file_is_named_with_the_line(tmp_path, name, data, parts):
    path = tmp_path / name
    path.write_bytes(data)
    message = message_of(str(path))
    assert str(path) in message
    assert all(part in message for part in parts), message


def test_a_parquet_file_without_text_says_what_it_has(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, body=["x"], number=[3])
    assert "no column 'text'; it has 'body', 'number'" in message_of(str(path))
    assert "row 1: column 'number' holds int" in message_of(str(path), text_column="number")


def test_an_unreadable_file_gives_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    assert message_of(str(path)) == f"cannot read {path}: Permission denied"


def test_files_have_no_splits(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "split='validation'" in message_of(str(tmp_path / "a.txt"), split="validation")
    assert "subset='en'" in message_of("pydoc", subset="en")


# -- data sets ------------------------------------------------------------------------------------


def test_an_unreachable_hub_data_set(offline):
    message = message_of("nobody/nothing", subset="en", split="test")
    assert all(part in message for part in ["'nobody/nothing'", "'en'", "'test'", "hub"]), message
    assert "'nothing'" in message_of("nothing", streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_gets_every_option_and_yields_its_texts(monkeypatch, streaming):
    data = datasets.Dataset.from_dict({"body": ["a", "", "b"], "text": ["1", "2", "3"]})
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"split": "test", "streaming": streaming}
    corpus = load_corpus("some/set@v2", subset="en", text_column="body", **options)
    assert calls == [(("some/set", "en"), options | {"revision": "v2"})]
    assert list(corpus) == list(corpus) == ["a", "b"]
    missing = message_of("some/set", text_column="gone")
    assert "no column 'gone'; it has 'body', 'text'" in missing


def test_a_stream_that_breaks_off_is_an_input_error(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise RuntimeError("connection lost\nlong story")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    assert message_of("some/set") == "reading some/set stopped: connection lost"


def test_a_saved_data_set(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a", "b"]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(validation=data).save_to_disk(tmp_path / "splits")
    assert list(load_corpus(str(tmp_path / "one"))) == ["a", "b"]
    assert list(load_corpus(str(tmp_path / "splits"), split="validation")) == ["a", "b"]
    assert "no split 'train'; it has validation" in message_of(str(tmp_path / "splits"))
    assert "has no splits" in message_of(str(tmp_path / "one"), split="test")
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "cannot read the data set" in message_of(str(tmp_path / "one"))


def test_importing_corpora_stays_light():
    code = (
        "import sys, blockdiff.data.corpora;"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# -- pydoc ----------------------------------------------------------------------------------------


def test_pydoc_is_about_two_megabytes_of_distinct_english_documents():
    documents = list(load_corpus("pydoc"))
    text = "".join(documents)
    assert len(documents) > 300
    assert 1_200_000 < len(text) < 4_000_000
    assert len(set(documents)) == len(documents)
    assert ">>>" not in text
    assert sum(text.count(f" {word} ") for word in ("the", "is", "of", "a", "to")) > 25_000
    assert any(document.startswith('The "assert" statement') for document in documents)
    assert not any("site-packages" in document[:200] for document in documents)


def test_pydoc_is_topics_then_modules_in_order_without_tests_and_twins(tmp_path, monkeypatch):
    for name in ("b.py", "a/z.py", "a/test/x.py", "site-packages/p.py", "b_twin.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""The docstring of module {path.stem[:1]}, long enough to stay."""')
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    documents = pydoc_documents.__wrapped__()
    assert documents[0].startswith('The "assert" statement')
    modules = [document for document in documents if document.startswith("The docstring of")]
    assert modules == [f"The docstring of module {name}, long enough to stay." for name in "zb"]
    assert documents[-2:] == tuple(modules)


def test_docstrings_come_in_source_order_without_doctests(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        '"""A module docstring that is long enough to be prose.\n\n'
        '    >>> 1 + 1\n    2\n\nAfter."""\n'
        "if True:\n"
        "    class A:\n"
        '        """A class docstring that is long enough to be prose."""\n'
        "        def f(self):\n"
        '            "Too short."\n'
        "try:\n"
        "    pass\n"
        "except Exception:\n"
        "    async def g():\n"
        '        """A function docstring that is\n\n        long enough to be prose."""\n'
    )
    assert _docstrings(module) == [
        "A module docstring that is long enough to be prose.\n\nAfter.",
        "A class docstring that is long enough to be prose.",
        "A function docstring that is\n\nlong enough to be prose.",
    ]
    module.write_text("def template($name): pass")
    assert _docstrings(module) == []


def test_a_python_without_pydoc_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="no pydoc_data"):
        pydoc_documents.__wrapped__()


# -- splitting ------------------------------------------------------------------------------------


def test_many_documents_are_split_whole_and_in_order():
    documents = [f"{i:03d}" * (1 + i % 7) for i in range(200)]
    training, validation = split_documents(documents, 0.1, seed=3)
    assert sorted(training + validation) == sorted(documents)
    assert [d for d in documents if d in set(training)] == training
    assert [d for d in documents if d in set(validation)] == validation
    share = sum(map(len, validation)) / sum(map(len, documents))
    assert 0.1 <= share <= 0.15
    assert split_documents(iter(documents), 0.1, seed=3) == (training, validation)
    assert split_documents(documents, 0.1, seed=4) != (training, validation)


@pytest.mark.parametrize("count", [3, 30])
def test_a_side_of_a_split_knows_its_length(tmp_path, count):
    path = tmp_path / "corpus.jsonl"
    lines = (json.dumps({"text": f"Document {i}. It says little.\n" * 3}) for i in range(count))
    path.write_text("\n".join(lines))
    for side in split_documents(load_corpus(str(path)), 0.2, seed=1):
        assert 0 < len(side) == len(list(side))


def test_the_split_is_the_same_on_any_machine():
    _, validation = split_documents([str(i) for i in range(10, 40)], 0.1)
    assert validation == ["13", "25", "35"]


def test_one_book_among_notes_stays_in_training():
    documents = ["book " * 10_000] + [f"note {i}" for i in range(50)]
    for seed in range(20):
        training, validation = split_documents(documents, 0.05, seed)
        assert documents[0] in training
        assert validation


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_both_sides_get_at_least_one_document(fraction):
    training, validation = split_documents([f"text {i}" for i in range(10)], fraction)
    assert training and validation and len(training) + len(validation) == 10


def test_few_documents_give_up_their_tails_at_a_line_or_sentence_end():
    lines = "".join(f"line number {i}\n" for i in range(500))
    prose = "One sentence here. " * 500
    training, validation = split_documents([lines, prose], 0.1)
    assert [head + tail for head, tail in zip(training, validation, strict=True)] == [lines, prose]
    assert training[0].endswith("\n") and training[1].endswith("here. ")
    for tail, whole in zip(validation, (lines, prose), strict=True):
        assert 0.09 < len(tail) / len(whole) < 0.11


def test_a_text_without_ends_is_cut_where_it_must_be():
    training, validation = split_documents(["x" * 100], 0.25)
    assert (len(training[0]), len(validation[0])) == (75, 25)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_zero_and_one(fraction):
    with pytest.raises(InputError, match="between 0 and 1"):
        split_documents(["a", "b"], fraction)


@pytest.mark.parametrize("documents", [[], ["x"], ["x", ""]])
def test_too_little_to_split(documents):
    with pytest.raises(InputError, match="too small to split"):
        split_documents(documents)


def test_several_sources_keep_their_order(monkeypatch, tmp_path):
    path = tmp_path / "local.txt"
    path.write_text("local", encoding="utf-8")
    data = datasets.Dataset.from_dict({"text": ["hub"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    assert list(load_corpus([str(path), "some/set"])) == ["local", "hub"]
