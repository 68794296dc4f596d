import io
import sys

import pytest

from blockdiff.progress import track


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
