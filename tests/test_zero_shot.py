"""One command, one table: files and the paper's names, each through its detokeniser."""

import json
from pathlib import Path

import datasets
import pytest

from blockdiff import cli
from blockdiff.commands.zero_shot import ZeroShotOptions
from blockdiff.data.detokenizers import DETOKENIZERS
from blockdiff.errors import InputError
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


def test_a_wrong_name_costs_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for texts, words in (("ptbb", "one of ptb"), (",", "no text to measure"),
                         ("/nowhere/x.txt", "/nowhere/x.txt")):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            cli.main(["zero-shot", str(model), "--texts", texts])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1
    with pytest.raises(InputError):
        find_text_sets("")
    texts = "./ptb.txt:ptb,ptb,./ptb.txt"
    assert set(find_text_sets(texts)) == {"./ptb.txt:ptb", "ptb", "./ptb.txt"}
