import io
import sys

import pytest

from blockdiff.progress import advance, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("kind", [list, iter])
def test_passes_every_item_on_as_it_comes(stream, kind, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(track(kind([1, 2, 3]), "Reading")) == [1, 2, 3]


def test_a_log_gets_whole_lines_at_the_interval_and_nothing_for_short_work(monkeypatch):
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    list(track([1, 2], "Tokenising", every=0))
    first, second = log.getvalue().splitlines()
    assert first.startswith("Tokenising: 1 of 2 after 0 s, about ")
    assert second == "Tokenising: 2 of 2 after 0 s"
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    list(track([1, 2], "Tokenising"))
    assert log.getvalue() == ""


def test_a_second_bar_inside_a_first_loses_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    inner = [list(track([3, 4], "[in]ner")) for _ in track([1, 2], "Outer")]
    assert inner == [[3, 4], [3, 4]]


def test_a_long_work_tells_every_half_minute(monkeypatch):
    """By a clock of the test's own: 2 s an item, 100 items, a line at 30, 60, … 180 s."""
    now = [0.0]

    def items():
        for item in range(100):
            now[0] += 2.0
            yield item

    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    list(track(items(), "Tokenising", 100, clock=lambda: now[0]))
    lines = log.getvalue().splitlines()
    assert lines[0] == "Tokenising: 15 of 100 after 30 s, about 2 min 50 s left"
    assert len(lines) == 6 and lines[-1] == "Tokenising: 90 of 100 after 3 min 0 s, about 20 s left"


@pytest.mark.parametrize("total", [None, 7])
def test_work_that_reports_itself(monkeypatch, total):
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with advance("ar on [x]", total, "sequences", clock=lambda: now[0]) as done:
        done(2)
        now[0] = 31
        done(3)
        done(1)
    of = "" if total is None else " of 7"
    assert log.getvalue().startswith(f"ar on [x]: 5{of} sequences after 31 s")
    assert log.getvalue().count("\n") == 1


def test_an_error_in_the_work_is_the_work_s(monkeypatch):
    for stream in (io.StringIO, Terminal):
        monkeypatch.setattr(sys, "stderr", stream())
        with pytest.raises(KeyError), advance("Reading", 3):
            raise KeyError
