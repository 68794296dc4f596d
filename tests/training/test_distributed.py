"""Two processes (gloo, on the CPU) train as one does: real launchers, real commands."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import pytest
import sharded
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from blockdiff.data.corpora import load_corpus
from blockdiff.data.packing import StreamedWindows
from blockdiff.data.tokenizers import load_tokenizer
from blockdiff.errors import InputError
from blockdiff.training.arguments import micro_batch
from blockdiff.training.callbacks import read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train
from processes import pair

ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--num_cpu_threads_per_process=1",
              "--main_process_port=0", "-m"]  # fmt: skip
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0", "-m"]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    words = [
        "each",
        "process",
        "takes",
        "its",
        "rows",
        "of",
        "the",
        "masks",
        "drawn",
        "for",
        "the",
        "whole",
        "batch",
    ]
    texts = [" ".join(words[(i * j) % len(words)] for j in range(1, 20 + i)) for i in range(1, 40)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


def small(corpus: Path, out: Path) -> TrainConfig:
    """Padded windows, so that the processes' rows hold unequal numbers of tokens."""
    return TrainConfig(
        out=str(out), data=str(corpus), vocab_size=280, length=32, steps=8, batch_size=4,
        warmup=2, dropout=0.0, ema=0.9, precision="float32", log_every=1, save_every=4,
        eval_windows=5, across_documents=False, report_to="none",
    )  # fmt: skip


def words_of(config: TrainConfig) -> list[str]:
    """`train` and the options that are not at their default, as they are typed."""
    given = [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in vars(config).items()
        if value is not None and value != getattr(TrainConfig(), name)
    ]
    return ["train", *given]


def two_processes(launcher: list[str], config: TrainConfig) -> None:
    command = [sys.executable, "-m", *launcher, "blockdiff", *words_of(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def logged(folder: Path, *keys: str) -> torch.Tensor:
    lines = read_metrics(folder / "metrics.jsonl")
    return torch.tensor([m[key] for key in keys for m in lines if key in m], dtype=torch.float64)


def assert_same_run(ours: Path, theirs: Path) -> None:
    for key in ("loss", "grad_norm", "eval_nats_per_token", "eval_stderr"):
        a, b = logged(ours, key), logged(theirs, key)
        assert len(a) > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def test_two_processes_take_the_steps_of_one_and_another_number_resumes(
    corpus: Path, tmp_path: Path
) -> None:
    """Same loss, gradient norm and weights at the same global batch; the same validation."""
    one = train(small(corpus, tmp_path / "one"), progress=False).folder
    assert len(logged(one, "grad_norm")) == 8
    two_processes(ACCELERATE, small(corpus, tmp_path / "two"))
    assert_same_run(tmp_path / "two", one)
    # Four steps in two processes; the rest in one.
    cut = replace(small(corpus, tmp_path / "cut"), steps=4)
    two_processes(TORCHRUN, cut)
    train(replace(cut, steps=8, resume=True), progress=False)
    final = load_file(one / "model.safetensors")
    resumed = load_file(tmp_path / "cut" / "model.safetensors")
    for name in final:
        torch.testing.assert_close(resumed[name], final[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_sharded_network_takes_the_steps_of_a_whole_one(tmp_path: Path) -> None:
    """FSDP2 by layer over gloo, by hand and as accelerate does under our recipe."""
    for done in pair(tmp_path, [str(tmp_path / "done")], sharded.main):
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done").read_text() == "same"


def test_a_sharded_run_is_the_run_of_one_process(corpus: Path, tmp_path: Path) -> None:
    """Loss, gradient norm, validation and the saved average; accelerate's own part is replaced."""
    one = train(small(corpus, tmp_path / "one"), progress=False).folder
    config = small(corpus, tmp_path / "two")
    for done in pair(tmp_path, [json.dumps(vars(config))], sharded.run):
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "two", one)


def test_micro_batches_take_their_rows_of_the_same_masks(corpus: Path, tmp_path: Path) -> None:
    config = replace(small(corpus, tmp_path / "one"), across_documents=True)
    one = train(config, progress=False).folder
    four = train(replace(config, out=str(tmp_path / "four"), accumulate=4), progress=False).folder
    assert_same_run(four, one)


def test_a_stream_trains_in_two_processes(corpus: Path, tmp_path: Path) -> None:
    first = train(replace(small(corpus, tmp_path / "first"), steps=1), progress=False).folder
    config = replace(
        small(corpus, tmp_path / "stream"), streaming=True, across_documents=True,
        validation_data=str(corpus), tokenizer=str(first), steps=3,
    )  # fmt: skip
    for done in pair(tmp_path, words_of(config)):
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(logged(tmp_path / "stream", "grad_norm")) == 3


def test_a_mixture_is_the_same_on_any_number_of_processes(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text, of words that the first one has not. " * 40)
    config = replace(
        small(corpus, tmp_path / "two"), data=[str(corpus), str(other)], data_weights="1,3"
    )
    one = train(replace(config, out=str(tmp_path / "one")), progress=False).folder
    words = [word for word in words_of(config) if not word.startswith("--data=")]
    for done in pair(tmp_path, [*words, "--data", str(corpus), "--data", str(other)]):
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "two", one)
    train(replace(config, out=str(tmp_path / "cut"), steps=4), progress=False)
    train(replace(config, out=str(tmp_path / "cut"), resume=True), progress=False)
    torch.testing.assert_close(logged(tmp_path / "cut", "loss"), logged(one, "loss"))


@pytest.mark.parametrize("weights", ["1e-300,1", "1e308,1e308", "1e-12,1", "nan,1", "0,1", "1"])
def test_weights_that_make_no_mixture(corpus: Path, tmp_path: Path, weights: str) -> None:
    config = replace(small(corpus, tmp_path / "run"), data=[str(corpus), str(corpus)])
    with pytest.raises(InputError, match="data_weights"):
        train(replace(config, data_weights=weights), progress=False)


def test_a_batch_that_cannot_be_shared_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = small(corpus, tmp_path / "run")
    assert micro_batch(replace(config, accumulate=2), 2) == 1
    with pytest.raises(InputError, match="a multiple of 6"):
        micro_batch(replace(config, accumulate=2), 3)


@pytest.mark.parametrize("kind", ["file", "files", "hub, one file", "hub, four files"])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_read_a_stream_without_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, workers: int
) -> None:
    texts = [f"document {i:03}" for i in range(48)]
    name = str(tmp_path / "stream.jsonl")
    Path(name).write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    if kind == "files":  # a document each
        name = str(tmp_path / "folder")
        Path(name).mkdir()
        for i, text in enumerate(texts):
            (Path(name) / f"{i}.txt").write_text(text, encoding="utf-8")
    elif kind != "file":
        name = "owner/name"
        rows = datasets.Dataset.from_list([{"text": t} for t in texts])
        stream = rows.to_iterable_dataset(num_shards=1 if "one" in kind else 4)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: stream)
    read = []
    for process in range(2):
        part = load_corpus(name, streaming=True, process=(process, 2))
        loader = DataLoader(_Listed(part), batch_size=None, num_workers=workers)
        read.append(list(loader))
    assert sorted(read[0] + read[1]) == texts
    assert min(map(len, read)) > 0


class _Listed(torch.utils.data.IterableDataset[str]):
    def __init__(self, documents: object) -> None:
        self.documents = documents

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self.documents)


def test_an_endless_stream_begins_again(corpus: Path, tmp_path: Path) -> None:
    """No short last batch, however long the run; a worker without text is no error."""
    run = train(replace(small(corpus, tmp_path / "run"), steps=1), progress=False).folder
    tokenizer = load_tokenizer(str(run))
    once = [w["x_0"] for w in StreamedWindows(load_corpus(corpus), tokenizer, length=8)]
    endless = StreamedWindows(load_corpus(corpus), tokenizer, length=8, endless=True)
    twice = [w["x_0"] for w in islice(endless, 2 * len(once))]
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=False))
    one = StreamedWindows(list(load_corpus(corpus))[-1:], tokenizer, length=8, endless=True)
    loader = DataLoader(one, batch_size=2, num_workers=2, drop_last=True)
    assert [len(batch["x_0"]) for batch in islice(loader, 20)] == [2] * 20


def test_windows_of_a_shared_stream_hold_every_token_once(corpus: Path, tmp_path: Path) -> None:
    """A stream that deals its documents out itself is not cut a second time."""
    run = train(replace(small(corpus, tmp_path / "run"), steps=1), progress=False).folder
    tokenizer = load_tokenizer(str(run))
    shared: Counter[int] = Counter()
    for process in range(2):
        documents = load_corpus(corpus, streaming=True, process=(process, 2))
        windows = StreamedWindows(documents, tokenizer, length=1)
        shared.update(w["x_0"].item() for w in DataLoader(windows, batch_size=None, num_workers=2))
    alone = StreamedWindows(load_corpus(corpus), tokenizer, length=1)
    assert shared == Counter(w["x_0"].item() for w in alone)
