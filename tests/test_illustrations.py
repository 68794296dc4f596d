"""The figures of docs/theory.md: what they claim, computed another way."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import blockdiff
from blockdiff.apps.illustrations import block_weights, draw_all, weight_of_k

THEORY = Path(__file__).parents[1] / "docs" / "theory.md"


def test_every_figure_is_drawn_and_shown(tmp_path: Path) -> None:
    drawn = {path.name for path in draw_all(tmp_path)}
    shown = set(re.findall(r"!\[[^\]]*\]\(theory/(\w+\.png)\)", THEORY.read_text("utf-8")))
    assert drawn == shown
    for name in drawn:
        assert imread(tmp_path / name).std() > 0.05
        assert (THEORY.parent / "theory" / name).is_file()


def test_the_functions_theory_names_exist() -> None:
    """`module.function` in backticks, relative to the package."""
    names = set(re.findall(r"`((?:\w+\.)+\w+)`", THEORY.read_text("utf-8")))
    found = 0
    for name in names:
        module, _, attribute = name.rpartition(".")
        path = Path(blockdiff.__file__).parent / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")
        if path.is_file():
            found += 1
            assert re.search(rf"^\s*(def|class) {attribute}\b", path.read_text("utf-8"), re.M), name
        else:
            assert attribute in ("md", "png", "json", "py"), name
    assert found > 15


def test_weights_by_k() -> None:
    """Uniform on [0, 1]; all on k = n where everything is masked; else by simulation."""
    assert weight_of_k(0, 1, 4) == pytest.approx([0.25] * 4, abs=1e-4)
    assert weight_of_k(1, 1, 4) == pytest.approx([0, 0, 0, 1], abs=1e-6)
    rng = np.random.default_rng(0)
    rate = rng.uniform(0.3, 0.8, 400_000)
    k = rng.binomial(4, rate)
    drawn = [float(np.where(k == i, i / (4 * rate), 0).mean()) for i in range(1, 5)]
    # Each is a mean of 400,000 numbers of at most 1/0.3: five standard errors are under 0.01.
    assert weight_of_k(0.3, 0.8, 4) == pytest.approx(drawn, abs=0.01)


def test_a_blocks_total_weight_is_constant_under_exact_k_alone() -> None:
    assert block_weights("exact_k", 4, blocks=1000).std() < 1e-6
    plain = block_weights("bernoulli", 4, blocks=100_000)
    assert plain.mean() == pytest.approx(1, abs=0.03) and plain.var() > 1
