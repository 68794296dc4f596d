"""The miniature reproduction, whole but minute: every job runs, stops, goes on and is reported."""

import json
import math
import os
import random
import re
import signal
import statistics
import time
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from blockdiff import cli, folders, objectives
from blockdiff.apps.reproduction.control import HalfCounted
from blockdiff.apps.reproduction.plan import CLIPS, LONGER, SMOKE, Scale, plan
from blockdiff.apps.reproduction.pool import KINDS, passages, prepared
from blockdiff.apps.reproduction.report import report_text
from blockdiff.apps.reproduction.results import Rate, Results, Summary, over_seeds
from blockdiff.errors import InputError
from blockdiff.models.config import DiTConfig
from blockdiff.models.dit import DiT
from blockdiff.training.config import TrainConfig
from processes import started


def test_the_plan_is_whole_and_in_order() -> None:
    jobs = plan(Scale())
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert set(TopologicalSorter({job.name: job.after for job in jobs}).static_order()) == set(
        names
    )
    for job in jobs:
        if job.kind == "train":
            own = ("continues", "total", "half_counted")
            wish = {k: v for k, v in job.settings.items() if k not in own}
            TrainConfig(**wish)
            assert job.settings.get("continues", job.name) in names


def test_every_model_sees_the_same_number_of_tokens() -> None:
    jobs = {job.name: job for job in plan(Scale())}

    def steps(name: str) -> int:
        wish = jobs[name].settings
        before = wish.get("continues") or wish.get("init_from")
        return wish["steps"] + (steps(before) if before else 0)

    trained = [
        name
        for name, job in jobs.items()
        if job.kind == "train" and not name.endswith(("-base", "-longer"))
    ]
    assert len(trained) > 20 and {steps(name) for name in trained} == {Scale().steps}
    longer = [name for name in jobs if name.endswith("-longer")]
    assert {steps(name) for name in longer} == {LONGER * Scale().steps} and len(longer) == 2


def begin(*arguments: Any) -> None:
    with prepared(*arguments):
        pass


def test_another_plan_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"text": f"document {i} of a few words " * 30}) for i in range(20))
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    begin(out, str(tmp_path / "data.jsonl"), SMOKE)
    before = (out / "plan.json").read_bytes()
    begin(out, str(tmp_path / "data.jsonl"), SMOKE)
    with pytest.raises(InputError, match="another size"):
        begin(out, str(tmp_path / "data.jsonl"), Scale())
    assert (out / "plan.json").read_bytes() == before
    job = plan(SMOKE)[0].record()
    (out / "results").mkdir()
    result = out / "results" / f"{job['name']}.json"
    result.write_text(json.dumps({"job": job}), encoding="utf-8")
    begin(out, str(tmp_path / "data.jsonl"), SMOKE)
    job["settings"]["steps"] += 1
    result.write_text(json.dumps({"job": job}), encoding="utf-8")
    with pytest.raises(InputError, match="another plan"):
        begin(out, str(tmp_path / "data.jsonl"), SMOKE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        begin(tmp_path / "other", "pydoc", SMOKE)


def test_smoke_survives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command itself, killed with all its workers half-way, then run again to the report.

    The second time with one worker: how many there are is no part of the plan.
    """
    words = "the people of this state and its government have laws for war and peace and trade"
    rng = random.Random(0)
    texts = [
        ". ".join(" ".join(rng.choices(words.split(), k=12)).capitalize() for _ in range(12)) + "."
        for _ in range(60)
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    out = tmp_path / "out"
    words = ["reproduce", "paper-mini", "--smoke", "--data", str(corpus), "--out", str(out)]
    monkeypatch.setenv("BLOCKDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the command sets it for its workers
    first = started(tmp_path / "log", [*words, "--workers", "2"], os.setsid)
    while len(done := list((out / "results").glob("*.json"))) < 6:
        assert first.is_alive(), (tmp_path / "log" / "stderr").read_text()
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.join()
    written = {path: path.stat().st_mtime_ns for path in done}
    assert len(written) < len(plan(SMOKE))
    cli.main([*words, "--workers", "1"])
    assert capsys.readouterr().out.strip() == str(out / "report" / "report.md")
    assert {path: path.stat().st_mtime_ns for path in done} == written, "what was done stays"
    results = sorted(path.stem for path in (out / "results").glob("*.json"))
    assert results == sorted(job.name.replace("/", ".") for job in plan(SMOKE))
    report = (out / "report" / "report.md").read_text(encoding="utf-8")
    for part in ("28.23", "Blocks of one", "Initialisation", "Variance", "clips.png", "Samples",
                 "At the nearest NFE", "the paper's way"):  # fmt: skip
        assert part in report
    for plot in re.findall(r"!\[\w+\]\((\w+\.png)\)", report):
        assert (out / "report" / plot).stat().st_size > 5000
    _figures_are_those_of_the_results(out, report)
    with folders.claim(out, overwrite=True, kinds=KINDS):
        folders.clear(out, KINDS)
    assert not list(out.iterdir()), "all it wrote is what `overwrite` replaces"


def _figures_are_those_of_the_results(out: Path, report: str) -> None:
    """A few figures, from the per-window nats up to the report."""
    found = Results(out, SMOKE)
    raw = [json.loads((out / "results" / f"s{s}-L4.likelihood.json").read_text()) for s in range(2)]
    rates = [sum(x["nats"]) / sum(x["tokens"]) for x in raw]
    model = found.nats("L4").rate
    assert model.mean == pytest.approx(sum(rates) / 2) and found.nats("L4").seeds == 2
    assert f"{math.exp(sum(rates) / 2):.2f} [" in report
    gap, error = found.nats("L4", 0).minus(found.nats("L4", 1))
    assert gap == pytest.approx(rates[0] - rates[1]) and error > 0
    summary = json.loads((out / "report" / "results.json").read_text(encoding="utf-8"))
    assert summary["over_seeds"]["L4"]["perplexity"] == model.perplexity
    assert summary["over_seeds"]["L4"]["by_seed"] == pytest.approx([math.exp(r) for r in rates])
    assert report == report_text(summary), "the text is that of results.json"
    share, low, high = found.gap_closed("L4")
    ar, mdlm = (found.nats(name).rate.perplexity for name in ("ar", "mdlm"))
    assert share == pytest.approx((mdlm - model.perplexity) / (mdlm - ar)) and low < share < high
    closed = summary["gap_closed"]["L4"]
    assert (closed["share"], closed["interval_95"]) == (share, [low, high])
    for s, own in enumerate(closed["by_seed"]):
        ar, l4, mdlm = (found.rate(name, s).perplexity for name in ("ar", "L4", "mdlm"))
        assert own == pytest.approx((mdlm - l4) / (mdlm - ar))
    for name, gaps in summary["nats_above"].items():
        # Blocks of one are compared in percent, the others in nats.
        forms = [(f"{abs(gap):.4f}", f"{math.expm1(gap):+.1%}") for gap, _ in gaps]
        shown = all(any(form in report for form in pair) for pair in forms)
        assert gaps and (shown or "L1" in name), name
    _the_best_clip_is_named(out, report)
    sedd = found["samples-sedd-end"]
    assert max(sedd["lengths"]) < SMOKE.length <= max(found["samples-L4-long"]["lengths"])


def _the_best_clip_is_named(out: Path, report: str) -> None:
    """At the seed that has every clip, against exact_k of the same seed."""

    def nats(model: str) -> float:
        path = out / "results" / f"s0-L16{model}.likelihood.json"
        raw = json.loads(path.read_text())
        return sum(raw["nats"]) / sum(raw["tokens"])

    gaps = {name: nats(f"-{name}") - nats("-from-ar") for name in CLIPS}
    best = min(gaps, key=lambda name: gaps[name])
    assert f"best clip of seed 0 ({best})" in report
    assert f"the clip is {gaps[best]:+.4f} ±" in report


DOCS = Path(__file__).parents[1] / "docs" / "reproduction"


def test_the_committed_report_is_what_its_results_say() -> None:
    record = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    assert (DOCS / "report.md").read_text(encoding="utf-8") == report_text(record)
    since = {job.name for job in plan(Scale()) if "-at-" in job.name}  # not run at that size yet
    assert set(record["jobs"]) == {job.name for job in plan(Scale())} - since
    results = Summary(record)
    for name, found in record["over_seeds"].items():
        own = [results.rate(name, seed) for seed in results.seeds(name)]
        assert found["by_seed"] == pytest.approx([rate.perplexity for rate in own])
        assert results.mean(name).mean == pytest.approx(sum(r.mean for r in own) / len(own))


@pytest.mark.parametrize("count", [2, 3, 10, 40])
def test_the_interval_over_seeds_is_students(count: int) -> None:
    rng = random.Random(count)
    values = [rng.gauss(3, 0.1) for _ in range(count)]
    low, high = over_seeds(values)
    error = stats.sem(values)
    expected = stats.t.interval(0.95, count - 1, statistics.mean(values), error)
    if count <= 10:
        assert (low, high) == pytest.approx(expected, rel=1e-4)
    else:
        assert low < expected[0] and high > expected[1]
        assert high - low < 1.2 * (expected[1] - expected[0])
    assert over_seeds(values[:1]) is None


def test_a_rates_interval() -> None:
    low, high = Rate(2.0, 0.1).interval
    assert (math.log(low), math.log(high)) == pytest.approx((2 - 0.196, 2 + 0.196))


def test_the_control_counts_a_random_half(tmp_path: Path) -> None:
    """Its loss is AR's mean over them, the same for the same (seed, step) and no other."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DiT(DiTConfig(20, 64, 1, causal=True, adaln=False, dropout=0.0, **sizes))
    config = TrainConfig(out=str(tmp_path), objective="ar", ema=0.0, report_to="none", dropout=0.0)
    x_0 = torch.randint(0, 19, (32, 64), generator=torch.Generator().manual_seed(0))
    trainer = HalfCounted(model, config, [{"x_0": x_0[0]}], None, torch.device("cpu"), [])
    counted = trainer.counted(x_0)
    assert not counted[:, 0].any() and 0.47 < counted[:, 1:].float().mean() < 0.53
    with torch.no_grad():
        whole = objectives.ar(model, x_0, objectives.maskable_positions(x_0))
        loss = trainer.compute_loss(model, {"x_0": x_0})
    assert float(loss) == pytest.approx(float(whole[counted].mean()), rel=1e-5)
    assert torch.equal(trainer.counted(x_0), counted)
    trainer.state.global_step = 1
    assert not torch.equal(trainer.counted(x_0), counted)


def test_passages() -> None:
    text = "One is here. Two is there! Three? Four 3.5 is not cut. Five"
    assert passages(text, 2) == [
        "One is here. Two is there!",
        "Three? Four 3.5 is not cut.",
        "Five",
    ]
    assert passages(text, 0) == [text]
