"""One command, one table: files and the paper's names, each through its detokeniser."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import httpx2
import huggingface_hub
import pytest
from huggingface_hub.utils._http import default_client_factory

from blockdiff import cli
from blockdiff.data import hub_sets
from blockdiff.data.corpora import load_corpus
from blockdiff.data.detokenizers import DETOKENIZERS
from blockdiff.errors import InputError
from blockdiff.evaluation import zero_shot as module
from blockdiff.evaluation.options import ZeroShotOptions
from blockdiff.evaluation.zero_shot import TEXT_SETS, find_text_sets
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train

TEXT = "it does n't matter , he said , ( as ever ) what the weather is like . "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero-shot")
    write(folder / "train.jsonl", 30)
    config = TrainConfig(
        out=str(folder / "run"), data=str(folder / "train.jsonl"), vocab_size=280, length=32,
        steps=2, batch_size=2, eval_windows=2, report_to="none",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKDIFF_CACHE", str(folder / "cache"))
        return train(config, progress=False).folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))


def write(path: Path, count: int) -> None:
    lines = (json.dumps({"text": TEXT * (i % 4 + 1)}) for i in range(count))
    path.write_text("\n".join(lines), encoding="utf-8")


def test_files_and_names_in_one_table(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "news.jsonl", 12)
    asked = []

    def hub(name: str, subset: str | None, **options: object) -> datasets.Dataset:
        asked.append((name, subset, options["split"], options["revision"]))
        return datasets.Dataset.from_list([{"sentence": TEXT}] * 12)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    texts = f"ptb,{tmp_path / 'news.jsonl'}:lm1b,{tmp_path / 'news.jsonl'}"
    cli.main(["zero-shot", str(model), "--texts", texts, "--json"])
    records = json.loads(capsys.readouterr().out)
    assert asked == [("ptb-text-only/ptb_text_only", None, "test", "refs/convert/parquet")]
    assert [r["detokenizer"] for r in records] == ["ptb", "lm1b", "none"]
    assert [r["data"] for r in records[:2]] == ["ptb", "news"]
    for r in records:
        assert r["perplexity"] > 1 and r["stderr"] > 0
    # The same as evaluate gives, which is how a text is measured alone.
    cli.main(["evaluate", str(model), "--data", str(tmp_path / "news.jsonl"),
              "--detokenizer", "lm1b", "--json"])  # fmt: skip
    alone = json.loads(capsys.readouterr().out)
    assert alone["nats_per_token"] == records[1]["nats_per_token"]
    assert alone["nats_per_token"] != records[2]["nats_per_token"]
    cli.main(["zero-shot", str(model), "--texts", texts, "--windows", "2"])
    table = capsys.readouterr().out
    assert "ptb" in table and "news" in table and table.count("≤") >= 9


def test_the_papers_sets_are_all_there() -> None:
    assert set(TEXT_SETS) == {
        "ptb", "wikitext2", "wikitext103", "lm1b", "lambada", "ag_news", "pubmed", "arxiv"
    }  # fmt: skip
    default = ZeroShotOptions().texts
    assert list(find_text_sets(default)) == default.split(",") and len(default.split(",")) == 7
    assert {one.detokenizer for one in TEXT_SETS.values()} <= set(DETOKENIZERS)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("ptbb", "one of ptb"),
        (",", "no text to measure"),
        ("lambada,/nowhere/x.txt", "/nowhere/x.txt"),
        ("lambada,x.txt", "x.txt: no such file"),
        ("lambada,{file}:lmb1", "no detokenizer 'lmb1'"),
        ("lambada,owner/name:ptbb", "no detokenizer 'ptbb'"),
        ("lambada,{file}:", "no detokenizer ''"),
        ("lambada,s3://bucket/x.txt", "is a URL"),
        ("lambada,{empty}", "holds no text"),
    ],
)
def test_a_wrong_local_name_costs_nothing(
    texts: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write(tmp_path / "news.jsonl", 3)
    (tmp_path / "empty.txt").write_text(" ", encoding="utf-8")

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr(module, "open_to_measure", work)
    monkeypatch.setattr(datasets, "load_dataset", work)
    names = texts.format(file=tmp_path / "news.jsonl", empty=tmp_path / "empty.txt")
    with pytest.raises(SystemExit) as stop:
        cli.main(["zero-shot", "starter", "--texts", names])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_names_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError):
        find_text_sets("")
    assert set(find_text_sets("./ptb.txt:ptb,ptb,./ptb.txt")) == {
        "./ptb.txt:ptb", "ptb", "./ptb.txt"
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").write_text(TEXT, encoding="utf-8")
    assert find_text_sets("a:b")["a:b"].data == "a:b"


@pytest.fixture(params=["no name", "refused", "timeout", "status 503", "silent"])
def dead_hub(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """A hub that cannot be reached, and the addresses it was asked for."""
    asked: list[str] = []
    end = threading.Event()

    def answer(made: httpx2.Request) -> httpx2.Response:
        asked.append(str(made.url))
        if request.param == "silent":
            end.wait()
        if request.param == "timeout":
            raise httpx2.ConnectTimeout("timed out")
        if request.param in ("no name", "refused"):
            raise httpx2.ConnectError("[Errno -2] Name or service not known")
        return httpx2.Response(503)

    def wait(seconds: float) -> None:
        raise AssertionError(f"another try after {seconds} s")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_sets, "PATIENCE", 0.2 if request.param == "silent" else 60.0)
    monkeypatch.setattr(time, "sleep", wait)
    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(transport=httpx2.MockTransport(answer), follow_redirects=True)
    )
    yield asked
    end.set()
    huggingface_hub.set_client_factory(default_client_factory)


def test_what_is_out_of_reach_is_named_and_the_rest_is_measured(
    model: Path, tmp_path: Path, dead_hub: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    write(tmp_path / "news.jsonl", 12)
    (tmp_path / "tiny.txt").write_text("it", encoding="utf-8")
    texts = f"ptb,{tmp_path / 'news.jsonl'},{tmp_path / 'tiny.txt'},lambada,nobody/nothing"
    arguments = ["zero-shot", str(model), texts, "--windows", "2"]
    cli.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    records = json.loads(out)
    assert [r["data"] for r in records] == ["ptb", "news", "tiny", "lambada", "nothing"]
    assert ["error" in r for r in records] == [True, False, True, True, True]
    assert all(set(r) == {"data", "error"} for r in records if "error" in r)
    assert "hub cannot be reached" in records[0]["error"] and "5 tokens" not in records[0]["error"]
    assert "less than one window" in records[2]["error"]
    assert records[1]["perplexity"] > 1
    # Asked once for all of its data sets, and nothing but the names on standard error.
    url = "/datasets/ptb-text-only/ptb_text_only/resolve/refs%2Fconvert%2Fparquet/README.md"
    assert len(dead_hub) == 1 and dead_hub[0].endswith(url)
    lines = err.splitlines()
    assert [line.split(" was not measured: ")[0] for line in lines] == [
        f"blockdiff: {name}" for name in ("ptb", "tiny", "lambada", "nothing")
    ]
    assert "--length of at most" in err
    assert not huggingface_hub.constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    cli.main(arguments)
    out, _ = capsys.readouterr()
    assert out.splitlines()[-1] == "not measured: ptb, tiny, lambada, nothing"
    assert "news" in out and "cannot be reached" not in out


def test_nothing_measured_is_an_error(
    dead_hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.txt").write_text("it", encoding="utf-8")
    for texts, words in (
        ("lambada", "lambada: the Hugging Face hub cannot be reached"),
        (f"lambada,ptb,{tmp_path / 'tiny.txt'}", "lambada, ptb: the Hugging Face hub"),
    ):
        dead_hub.clear()
        with pytest.raises(SystemExit) as stop:
            cli.main(["zero-shot", "starter", texts, "--json"])
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and words in err and err.count("\n") == 1 and not out
        assert len(dead_hub) == 1


def test_a_corpus_out_of_reach_is_asked_for_once(dead_hub: list[str]) -> None:
    for streaming in (False, True):
        with pytest.raises(InputError, match="'some/set' is no local file, the Hugging Face hub"):
            load_corpus("some/set", streaming=streaming)
    assert len(dead_hub) == 2


def test_a_copy_is_read_where_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_hub: list[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    folder = tmp_path / "some___set" / "default" / "0.0.0" / "abc"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a copy"}), encoding="utf-8")
    made = datasets.load_dataset("json", data_files=str(tmp_path / "texts.jsonl"), split="train")
    (written,) = {Path(file["filename"]).parent for file in made.cache_files}
    info = json.loads((written / "dataset_info.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    info |= {"config_name": "default", "dataset_name": "set", "version": None}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "set-train.arrow").write_bytes((written / "json-train.arrow").read_bytes())
    assert list(load_corpus("some/set")) == ["a copy"]
    assert len(dead_hub) == 1


@pytest.mark.parametrize("status", [200, 302, 401, 404])
def test_a_hub_that_answers_is_left_to_its_client(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = []

    def hub(*_: object, **__: object) -> datasets.Dataset:
        online.append(not huggingface_hub.constants.HF_HUB_OFFLINE)
        return datasets.Dataset.from_list([{"text": TEXT}])

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    transport = httpx2.MockTransport(lambda _: httpx2.Response(status))
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=transport))
    try:
        assert list(load_corpus("some/set")) == [TEXT] and online == [True]
    finally:
        huggingface_hub.set_client_factory(default_client_factory)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", "30"], "30"),
        (["--bos"], "BOS"),
        (["--window-marks"], "BOS"),
        (["--estimator", "clipped"], "clipped"),
    ],
)
def test_what_stops_every_text_stops_before_the_first(
    options: list[str], words: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def work(*_: object, **__: object) -> None:
        raise AssertionError("a text was packed")

    write(tmp_path / "news.jsonl", 3)
    monkeypatch.setattr(module, "pack_documents", work)
    monkeypatch.setattr("blockdiff.data.encoding.bos_id", lambda _: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["zero-shot", str(model), str(tmp_path / "news.jsonl"), *options])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_marked_windows_as_the_papers(model: Path, tmp_path: Path) -> None:
    """BOS, length − 2 tokens, EOS, and no EOS between documents."""
    write(tmp_path / "news.jsonl", 6)
    source = str(tmp_path / "news.jsonl")
    plain, marked = (
        module.zero_shot(model, source, eos=False, window_marks=marks)[0] for marks in (False, True)
    )
    length = int(plain["length"])
    assert abs(marked["sequences"] - plain["sequences"] * length / (length - 2)) <= 2
    assert marked["tokens_per_byte"] > plain["tokens_per_byte"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("as_json", [True, False])
def test_a_text_that_was_measured_is_not_lost(
    fault: type[BaseException], as_json: bool, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in ("first", "second"):
        write(tmp_path / f"{name}.jsonl", 6)
    measure = module.measure_sequences

    def measured(*args: object, data: str, **options: object) -> dict[str, object]:
        if data == "second":
            raise fault
        return measure(*args, data=data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure_sequences", measured)
    texts = f"{tmp_path / 'first.jsonl'},{tmp_path / 'second.jsonl'}"
    arguments = ["zero-shot", str(model), texts, "--windows", "2"]
    with pytest.raises((SystemExit, RuntimeError)) as stop:
        cli.main(arguments + ["--json"] * as_json)
    assert fault is RuntimeError or getattr(stop.value, "code", None) == 130
    out = capsys.readouterr().out
    assert [r["data"] for r in json.loads(out)] == ["first"] if as_json else "first" in out
