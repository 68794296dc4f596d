"""Names are shown as they are, by whatever prints or draws them."""

import html
import io
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from rich.console import Console

from blockdiff.evaluation.corpus import summary_table
from blockdiff.evaluation.likelihood import Likelihood
from blockdiff.evaluation.samples import Measured, SampleQuality, quality_table
from blockdiff.evaluation.variance import EstimatorVariance, Spread, variance_table
from blockdiff.evaluation.zero_shot import zero_shot_table
from blockdiff.plots import loss_plot, variance_plot
from blockdiff.printing import plain_console, printable
from blockdiff.progress import advance
from blockdiff.replay import Event, Recording

PARTS = ["[b]y[/b]", "[/]", "$a_b$", "$", ":smile:", "日本語", "<b>", "back\\slash"]
NAMES = [" ".join(PARTS), "\n".join(PARTS), "\x1b[31mred\x07 " + " ".join(PARTS)]


def whole(shown: str, name: str) -> None:
    for part in PARTS:
        assert part in shown, part
    assert "\x1b" not in shown and "\x07" not in shown


def record(name: str) -> dict:
    found = Likelihood(torch.ones(2), torch.ones(2), 1.0, 0.1, math.nan, "exact_k", 1, False)
    return {
        "model": name, "data": name, "kind": "bd3lm", "part": "all", "block_size": 4, "length": 8,
        **found.record(), "tokens_per_byte": 1.0, "nats_per_byte": 1.0, "bits_per_byte": 1.0,
        "bits_per_byte_stderr": 0.1,
    }  # fmt: skip


def quality() -> SampleQuality:
    one = Measured(1.0, math.nan)
    return SampleQuality(2, None, one, {1: one}, None, 3.0, 3, None, None)


def estimator(name: str) -> EstimatorVariance:
    spread = Spread(1.0, 0.1, 1.0, math.nan)
    return EstimatorVariance(name, 4, True, 1, 1.0, 0.1, spread, spread, 2, 2, 2)


PRINTERS = {
    "evaluate": lambda name: summary_table(record(name)),
    "zero-shot": lambda name: zero_shot_table([record(name)]),
    "evaluate-samples": lambda name: quality_table({name: quality()}),
    "variance": lambda name: variance_table([estimator(name)]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("printer", PRINTERS)
def test_a_table_shows_names_as_they_are(printer: str, name: str) -> None:
    # A cell is wrapped where it is too wide; what it holds is the same.
    shown = PRINTERS[printer](name)
    if printer in ("evaluate", "zero-shot"):
        whole(shown, name)
    else:
        cells = "".join(shown.split()).replace("│", "").replace("┃", "")
        for part in ("[b]", "$", ":s", "日"):
            assert part in cells, part
        assert "\x1b" not in shown


@pytest.mark.parametrize("name", NAMES)
def test_progress_shows_names_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with advance(name, 2, every=0) as done:
        done(1)
    whole(log.getvalue(), name)
    assert log.getvalue().count("\n") == 1


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with advance(NAMES[0], 2) as done:
        done(1)
    for part in PARTS:
        assert part in terminal.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_console_shows_names_as_they_are(name: str) -> None:
    file = io.StringIO()
    plain_console(file=file, width=200).print(printable(name))
    whole(file.getvalue(), name)
    assert isinstance(plain_console(), Console)


def curve() -> list[dict[str, float]]:
    return [{"tokens": 10.0 * i, "loss": 3 - i / 50} for i in range(1, 30)]


@pytest.mark.parametrize("name", NAMES)
def test_plots_draw_names_as_they_are(name: str, tmp_path: Path) -> None:
    """No formula, no warning of a glyph that no font has; and the figure is given back."""
    name = printable(name)
    spread = {"mask": 1.0, "mask_stderr": None}
    row = {"estimator": name, "block_size": 4, "unbiased": True, "passes": 1, "loss": spread,
           "gradient": None}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = loss_plot({name: curve(), "b$": curve()}, tmp_path / "a.png", title=name)
        noise = variance_plot([row, row], tmp_path / "b.png", title=name)
        assert loss_plot({"a": curve()}, title=name).axes
    for figure, title in (
        (losses, losses.axes[0].get_title("left")),
        (noise, noise.get_suptitle()),
    ):
        assert title == name and figure.axes
    legend = losses.axes[0].get_legend().get_texts()
    assert legend[0].get_text().startswith(name) and not legend[0].get_parse_math()
    assert noise.axes[0].get_yticklabels()[0].get_text() == name
    assert not noise.axes[0].get_yticklabels()[0].get_parse_math()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}


@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_names_as_they_are(name: str) -> None:
    page = Recording(["a", name], [], 1, 2, 4, [Event(1, [1])], 1, 1.0).page(name, name)
    assert f"<h1>{html.escape(name)}</h1>" in page and "<b>" not in page
