import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from blockdiff.errors import InputError
from blockdiff.plots import loss_plot, variance_plot


def metrics(end: float, lines: int = 60) -> list[dict[str, float]]:
    rng = np.random.default_rng(0)
    curve: list[dict[str, float]] = []
    for i in range(1, lines + 1):
        loss = end + 4 * np.exp(-i / 10)
        at = {"step": i, "tokens": 1000 * i}
        curve.append({**at, "loss": loss + 0.1 * rng.normal(), "tokens_per_second": 5.0})
        if i % 20 == 0:
            curve.append({**at, "eval_nats_per_token": loss, "eval_stderr": 0.02})
    return curve


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    original = Figure.savefig

    def savefig(self, *args, **options):
        saved.append(self)
        return original(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_writes_a_png_and_leaves_pyplot_alone(tmp_path: Path):
    before = "matplotlib.pyplot" in sys.modules
    path = tmp_path / "new" / "loss.png"
    loss_plot({"AR": metrics(2.0), "BD3-LM": metrics(2.3)}, path, title="Losses")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)
    assert image.shape[0] > 400
    assert image.shape[1] > 600
    assert len(np.unique(image[..., 0])) > 50
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_labels_name_curve_and_kind(tmp_path: Path, figures):
    loss_plot({"AR": metrics(2.0), "BD3-LM": metrics(2.3)}, tmp_path / "two.png", title="")
    loss_plot({"training": metrics(2.0)}, tmp_path / "one.png", title="")
    assert sorted(labels(figures[0])) == [
        "AR, training loss, smoothed",
        "AR, validation ± standard error",
        "BD3-LM, training loss, smoothed",
        "BD3-LM, validation ± standard error",
    ]
    assert sorted(labels(figures[1])) == ["training loss, smoothed", "validation ± standard error"]


def test_draws_what_was_measured(tmp_path: Path, figures):
    curve = metrics(2.0)
    loss_plot({"run": curve}, tmp_path / "loss.png", title="")
    axes = figures[0].axes[0]
    raw, smooth, validation = (line.get_xydata() for line in axes.lines[:3])
    training = [line for line in curve if "loss" in line]
    assert raw.tolist() == [[line["tokens"], line["loss"]] for line in training]
    assert smooth[:, 0].tolist() == raw[:, 0].tolist()
    assert np.abs(np.diff(smooth[30:, 1])).mean() < np.abs(np.diff(raw[30:, 1])).mean() / 2
    # An average over what there is: the ends are not pulled towards zero.
    assert smooth[-1, 1] == pytest.approx(raw[-2:, 1].mean(), abs=0.1)
    evaluations = [line for line in curve if "eval_stderr" in line]
    expected = [[line["tokens"], line["eval_nats_per_token"]] for line in evaluations]
    assert validation.tolist() == expected
    bars = axes.containers[0].lines[2][0].get_segments()
    assert [bar[1, 1] - bar[0, 1] for bar in bars] == pytest.approx([0.04] * 3)


def test_few_points_are_not_smoothed(tmp_path: Path, figures):
    loss_plot({"run": metrics(2.0, lines=5)}, tmp_path / "loss.png", title="")
    assert labels(figures[0]) == ["training loss"]


def test_a_single_validation_and_losses_that_are_no_numbers(tmp_path: Path, figures):
    curve = [
        {"step": 1, "tokens": 10, "loss": float("nan")},
        {"step": 2, "tokens": 20, "eval_nats_per_token": 3.0, "eval_stderr": 0.0},
    ]
    loss_plot({"run": curve}, tmp_path / "loss.png", title="")
    low, high = figures[0].axes[0].get_ylim()
    assert low < 3 < high
    assert labels(figures[0]) == ["validation ± standard error"]


@pytest.mark.parametrize("curves", [{}, {"run": []}, {"run": [{"step": 1, "tokens": 10}]}])
def test_nothing_to_draw(curves, tmp_path: Path):
    with pytest.raises(InputError, match="no losses to draw"):
        loss_plot(curves, tmp_path / "loss.png", title="")
    assert not list(tmp_path.iterdir())


def test_variance_plot(tmp_path):
    """A panel for each block size and kind; what has no noise is written as 0, not dropped."""
    record = {"unbiased": True, "passes": 1, "block_size": 4}
    records = [
        {**record, "estimator": name, "block_size": size,
         "loss": {"mask": value, "mask_stderr": value / 10},
         "gradient": {"mask": 2 * value, "mask_stderr": value}}
        for size in (1, 4)
        for name, value in (("exact_k", 0.0 if size == 1 else 0.02), ("bernoulli", 3.0))
    ]  # fmt: skip
    variance_plot(records, tmp_path / "v.png", title="noise")
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    for one in records:
        one["gradient"] = None
    variance_plot(records, tmp_path / "loss.png", title="noise")
    whole, half = ((tmp_path / name).stat().st_size for name in ("v.png", "loss.png"))
    assert half < whole


def test_each_block_size_has_its_curve_and_null_is_no_point(figures):
    """A validation of one window has no standard error, which JSON writes as null."""
    lines = [{"tokens": i, "loss": 3.0, f"loss_{(1, 16, 4)[i % 3]}": float(i)} for i in range(9)]
    lines.append({"tokens": 9, "eval_nats_per_token": 3.0, "eval_stderr": None})
    figure = loss_plot({"training": lines})
    assert labels(figure) == [f"training loss, L' = {size}" for size in (1, 4, 16)]
    drawn = [line.get_ydata().tolist() for line in figure.axes[0].get_lines()]
    assert drawn == [[0, 3, 6], [2, 5, 8], [1, 4, 7]]
    assert len({line.get_color() for line in figure.axes[0].get_lines()}) == 3
