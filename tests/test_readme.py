"""The README's commands and Python run, in its order, in one empty folder.

Only their size is cut down; every command, option and call stands as written.
"""

import io
import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from blockdiff import cli, folders
from blockdiff.apps import demo
from blockdiff.apps.benchmark import compare
from blockdiff.apps.demo import Pace, PacedTrainer
from blockdiff.commands import COMMANDS
from blockdiff.data.tokenizers import train_tokenizer
from blockdiff.training.callbacks import read_metrics
from blockdiff.training.config import TrainConfig
from blockdiff.training.run import train
from processes import CONTEXT


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no option makes smaller."""
    monkeypatch.setattr(compare, "START", CONTEXT)
    monkeypatch.setattr(demo, "MEASURED_WINDOWS", 8)
    monkeypatch.setattr(demo, "SAMPLING", replace(demo.SAMPLING, max_new_tokens=24))


README = Path(__file__).parents[1] / "README.md"

# Appended to a command of the README: the same thing, small.
SMALLER = {
    "train": ["--steps", "2", "--batch-size", "2", "--eval-windows", "2", "--report-to", "none"],
    "evaluate": ["--windows", "2"],
    "score": [],
    "zero-shot": ["--windows", "2"],
    "variance": ["--draws", "2", "--batches", "2", "--batch-size", "1", "--estimators", "paired"],
    "evaluate-samples": ["--words", "20"],
    "generate": ["--max-new-tokens", "4"],
    "chat": ["--max-new-tokens", "4"],
    "infill": [],
    "draft-table": [],
    "tune": ["--samples", "2", "--max-new-tokens", "4", "--orders", "confidence"],
    "tokenizer": [],
    "benchmark": ["--preset", "nano", "--batch-size", "1", "--repeats", "1"],
    "demo": ["--minutes", "0.05"],
    "export": [],
    "adapt": [],
    "completion": [],
}


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


# Hours, or minutes as --smoke: tests/test_reproduction.py runs it; till a signal:
# tests/test_serving.py. Ray takes long to start: benchmarks/batch_workers.py runs it.
ELSEWHERE = {"reproduce", "serve", "batch"}


def commands() -> list[list[str]]:
    text = "\n".join(code_blocks("bash")).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines()
            if line.startswith("blockdiff ")]  # fmt: skip


def test_the_readme_shows_every_command() -> None:
    assert {words[0] for words in commands()} == set(SMALLER) | ELSEWHERE
    assert set(SMALLER) | ELSEWHERE == set(COMMANDS)


def test_the_reading_path_is_as_long_as_is_said() -> None:
    path = README.parent / "src" / "blockdiff"
    found = re.search(
        r"read `([^`]+)` for the paper in five files of ([\d,]+) lines",
        " ".join(README.read_text(encoding="utf-8").split()),
    )
    assert found
    files = [path / name for name in found[1].split(" → ")]
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    assert len(files) == 5 and abs(lines - int(found[2].replace(",", ""))) < 0.05 * lines


def test_the_readme_names_the_test_command() -> None:
    assert "make test" in README.read_text(encoding="utf-8")
    assert "make test" in (README.parent / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(["What a causal language model reads."], 270)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes))
    lm.save_pretrained("causal")
    tokenizer.save_pretrained("causal")
    for words in commands():
        if words[0] in ELSEWHERE:
            continue
        words, to = (words[:-2], words[-1]) if words[-2] == ">" else (words, None)
        # The hub's texts cannot be had everywhere; tests/test_zero_shot.py has the names.
        words = [word.replace("wikitext103,lambada,", "") for word in words]
        words = ["causal" if word.startswith("HuggingFaceTB/") else word for word in words]
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))  # of a chat
        cli.main([*words, *SMALLER[words[0]]])
        out = capsys.readouterr().out
        assert out, words
        if to is not None:
            Path(to).write_text(out, encoding="utf-8")
    for block in code_blocks("python"):
        exec(compile(block, str(README), "exec"), {})


class Machine:
    """A clock that a training moves by asking it: so many calls slow, the others fast."""

    def __init__(self, slow_calls: int, slow: float, fast: float) -> None:
        self.now, self.calls = 0.0, 0
        self.slow_calls, self.slow, self.fast = slow_calls, slow, fast

    def __call__(self) -> float:
        self.calls += 1
        self.now += self.slow if self.calls <= self.slow_calls else self.fast
        return self.now


STEPS = 24


@pytest.mark.parametrize(
    ("machine", "finished"),
    [
        (Machine(6, 10.0, 0.1), True),  # disturbed at first
        (Machine(0, 0.0, 0.1), True),
        (Machine(10**6, 4.0, 4.0), False),  # slow throughout
    ],
)
def test_a_disturbed_start_neither_shrinks_the_demo_nor_lets_it_overrun(
    tmp_path: Path, machine: Machine, finished: bool
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and many words came after it. " * 60)
    config = TrainConfig(
        out=str(tmp_path / "run"), data=str(text), objective="ar", vocab_size=280, length=16,
        batch_size=2, steps=STEPS, warmup=3, lr=1e-2, dropout=0.0, ema=0.9, log_every=1,
        eval_windows=1, report_to="none", validation_data=str(text),
    )  # fmt: skip
    pace = Pace(seconds=100.0, clock=machine)
    done = train(config, progress=False, trainer_class=partial(PacedTrainer, pace=pace))
    steps = done.tokens_seen // 32
    rates = [line["learning_rate"] for line in read_metrics(done.folder / "metrics.jsonl")
             if "learning_rate" in line]  # fmt: skip
    assert rates[-1] < 0.25 * max(rates), "the rate has fallen by the end"
    if finished:
        assert steps == STEPS
    else:
        assert 2 <= steps < STEPS and machine.now < 150


def test_the_demo_leaves_everything_it_promises(tmp_path: Path) -> None:
    """Run by the test above as well; here its folder is looked into."""
    out = tmp_path / "demo"
    cli.main(["demo", "--out", str(out), "--minutes", "0.05"])
    for name in ("bd3lm/model.safetensors", "bd3lm/tokenizer.json", "ar/model.safetensors",
                 "metrics.jsonl", "report.md", "loss.png", "denoising.html"):  # fmt: skip
        assert (out / name).stat().st_size > 100, name
    report = (out / "report.md").read_text(encoding="utf-8")
    assert report.count("±") >= 2 and report.count("```text") == 3
    assert "tokens seen" in report
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--out", str(out), "--minutes", "0.05"])
    assert stop.value.code == 2
    with folders.claim(out, overwrite=True, kinds=("demo",)):
        folders.clear(out)
    assert not list(out.iterdir()), "all it wrote is what `overwrite` replaces"
