"""Files that are written line by line and go on where they were stopped."""

import json
import os
import signal
from pathlib import Path

import pytest

from blockdiff.errors import InputError, RunStopped
from blockdiff.jobs import SUFFIX, open_job
from helpers import largest_file

IDS = list(range(1, 41))
SETTINGS = {"seed": 3, "top_p": None, "stop": ["eos"]}


def line(number):
    return {"id": number, "text": f"é☕ {number}" * (number % 5), "figure": number / 7}


def work(path, until=40, settings=SETTINGS, **options):
    """Writes lines up to number `until`; the job's `done` at its beginning."""
    with open_job(path, **options) as job:
        job.begin(settings, IDS, kept={"budget": os.getpid()})
        begun = job.done
        for number in IDS[begun:until]:
            job.write([line(number)])
        return begun


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    work(tmp_path / "whole" / "out.jsonl")
    return (tmp_path / "whole" / "out.jsonl").read_bytes()


def test_it_is_json_by_the_line(whole):
    assert [json.loads(one) for one in whole.decode().splitlines()] == [line(n) for n in IDS]


def test_wherever_it_is_cut_it_goes_on_to_the_same_file(tmp_path, whole):
    """At every byte around the ends of some lines, as a kill in the middle of writing leaves it."""
    path = tmp_path / "out.jsonl"
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cuts = {0, 1, len(whole) - 1, len(whole)} | {ends[3] + d for d in range(-3, 4)} | {*ends[::9]}
    for cut in sorted(cuts):
        work(path, 1, overwrite=path.exists())
        path.write_bytes(whole[:cut])
        assert work(path) == whole[:cut].count(b"\n")
        assert path.read_bytes() == whole, cut
    assert work(path) == len(IDS), "nothing is left to do"
    path.write_bytes(whole[: ends[2]] + bytes(70))  # what a machine that lost its power leaves
    assert work(path) == 3 and path.read_bytes() == whole


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "out.jsonl"
    work(path, 7)
    before = path.read_bytes()
    for changed, words in (
        ({"seed": 4}, "begun with seed 3, not 4"),
        ({"top_p": 0.5}, "begun with top_p nothing, not 0.5"),
        ({"stop": ["none"]}, r'begun with stop \["eos"\], not \["none"\]'),
    ):
        with pytest.raises(InputError, match=words):
            work(path, settings={**SETTINGS, **changed})
    assert path.read_bytes() == before
    assert work(path, settings={"seed": 4}, overwrite=True) == 0
    assert work(path, settings={"seed": 4}) == len(IDS)


def test_settings_may_change_while_there_is_no_line(tmp_path):
    work(tmp_path / "out.jsonl", 0)
    assert work(tmp_path / "out.jsonl", settings={"seed": 4}) == 0


def test_what_it_keeps_to_is_what_it_was_told_first(tmp_path):
    for told in (5, 6):
        with open_job(tmp_path / "out.jsonl") as job:
            job.begin(SETTINGS, IDS, kept={"budget": told})
            assert job.kept == {"budget": 5}
            job.write([line(job.done + 1)])


@pytest.mark.parametrize("damage", [b'{"id": 9}\n', b"[]\n", b"no JSON\n", b'{"id": 2}\n'])
def test_lines_that_are_not_the_jobs_are_refused(tmp_path, damage):
    path = tmp_path / "out.jsonl"
    work(path, 1)
    with path.open("ab") as file:
        file.write(damage)
    held = path.read_bytes()
    if damage == b'{"id": 2}\n':
        assert work(path) == 2
        return
    with pytest.raises(InputError, match="line 2 is not what this job wrote"):
        work(path)
    assert path.read_bytes() == held


def test_files_of_others_are_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="that says what made it"):
            work(path, overwrite=overwrite)
    for name, words in (("", "is empty"), (".", "no regular file"), ("no/x", "make it first")):
        with pytest.raises(InputError, match=words):
            work(tmp_path / name if name else "")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"):
        work(tmp_path / "pipe")
    work(tmp_path / "out.jsonl", 2)
    (tmp_path / f"out.jsonl{SUFFIX}").write_text("{}")
    with pytest.raises(InputError, match="is not what a job wrote"):
        work(tmp_path / "out.jsonl")
    assert path.read_text() == "mine\n"


def test_one_job_at_a_time_writes_a_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_job(path) as job:
        with pytest.raises(InputError, match="another process writes to"):
            work(path)
        assert path.exists()
        job.begin(SETTINGS, IDS)
    work(path)


def test_a_job_that_never_begins_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), open_job(tmp_path / "out.jsonl"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_one_line_and_nothing_is_lost(tmp_path, whole):
    path = tmp_path / "out.jsonl"
    assert len(whole) < 4096  # which is written to try the disk
    with open_job(path) as job:
        job.begin(SETTINGS, IDS)
        with largest_file(len(whole) // 2), pytest.raises(InputError) as refused:
            for number in IDS:
                job.write([line(number)])
    kept = path.read_bytes()
    said = str(refused.value)
    assert whole.startswith(kept) and kept.endswith(b"\n") and len(kept) > len(whole) // 2 - 120
    count = kept.count(b"\n")
    assert "ulimit -f" in said and f"{count} lines are there" in said
    assert "\n" not in said
    work(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_between_two_lines(tmp_path, whole, number):
    path = tmp_path / "out.jsonl"
    said = "after 6 lines; the same command goes on"
    with pytest.raises(RunStopped, match=said) as stopped, open_job(path) as job:
        job.begin(SETTINGS, IDS)
        for at in IDS:
            if at == 6:
                signal.raise_signal(number)
            job.write([line(at)])
    assert stopped.value.exit_code == 128 + number
    assert work(Path(path)) == 6 and path.read_bytes() == whole
