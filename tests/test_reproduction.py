"""The miniature reproduction, whole but minute: every job runs, stops, goes on and is reported."""

import json
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from blockdiff.errors import InputError
from blockdiff.reproduction.plan import SMOKE, Scale, plan
from blockdiff.reproduction.pool import prepare
from blockdiff.training.config import TrainConfig


def test_the_plan_is_whole_and_in_order() -> None:
    jobs = plan(Scale())
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert set(TopologicalSorter({job.name: job.after for job in jobs}).static_order()) == set(
        names
    )
    for job in jobs:
        if job.kind == "train":
            wish = {k: v for k, v in job.settings.items() if k not in ("continues", "total")}
            TrainConfig(**wish)
            assert job.settings.get("continues", job.name) in names


def test_every_model_sees_the_same_number_of_tokens() -> None:
    jobs = {job.name: job for job in plan(Scale())}

    def steps(name: str) -> int:
        wish = jobs[name].settings
        before = wish.get("continues") or wish.get("init_from")
        return wish["steps"] + (steps(before) if before else 0)

    trained = [n for n, job in jobs.items() if job.kind == "train" and not n.endswith("-base")]
    assert len(trained) > 20 and {steps(name) for name in trained} == {Scale().steps}


def test_another_plan_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"text": f"document {i} of a few words " * 30}) for i in range(20))
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    prepare(out, str(tmp_path / "data.jsonl"), SMOKE)
    before = (out / "plan.json").read_bytes()
    prepare(out, str(tmp_path / "data.jsonl"), SMOKE)
    with pytest.raises(InputError, match="another size"):
        prepare(out, str(tmp_path / "data.jsonl"), Scale())
    assert (out / "plan.json").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="not empty"):
        prepare(tmp_path / "other", "pydoc", SMOKE)
