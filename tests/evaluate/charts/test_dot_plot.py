"""The picture of an arena."""

from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from potstill.core.errors import DataError
from potstill.core.measure import Measure
from potstill.evaluate.charts.dot_plot import draw_dots


def method(*bits: float) -> dict[str, list[Measure]]:
    agreed = [Measure("teacher_agreement", 1 - one / 4, "share", 9, "higher") for one in bits]
    return {
        "bits_per_byte": [Measure("bits_per_byte", one, "bits/byte", 9) for one in bits],
        "teacher_agreement": agreed,
    }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_every_seed_is_a_dot_and_the_mean_stands_among_them(drawn: list[Figure], tmp_path: Path) -> None:
    draw_dots({"cross_entropy": method(1.3, 1.4), "forward_kl": method(1.1, 1.2)}, tmp_path / "a.png", title="Title")
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0
    left, right = drawn[0].axes
    seeds, mean = left.lines[:2]
    assert list(seeds.get_xdata()) == [1.3, 1.4]
    assert list(mean.get_xdata()) == pytest.approx([1.35])
    assert [label.get_text() for label in left.get_yticklabels()] == ["cross_entropy", "forward_kl"]
    assert left.get_ylim()[0] > left.get_ylim()[1]
    assert left.get_xlabel() == "bits per byte,\nlower is better"
    assert right.get_xlabel().endswith("higher is better")


def test_baselines_stand_above_the_methods_and_a_far_one_at_the_edge_with_its_value(
    drawn: list[Figure], tmp_path: Path
) -> None:
    baselines = {
        "teacher": {"bits_per_byte": Measure("bits_per_byte", 1.0, "bits/byte", 9, low=0.9, high=1.1)},
        "before training": {"bits_per_byte": Measure("bits_per_byte", 9.0, "bits/byte", 9)},
    }
    draw_dots({"a+b": method(1.3, 1.4), "c": method(1.1, 1.2)}, tmp_path / "a.png", baselines=baselines)
    left = drawn[0].axes[0]
    labels = [label.get_text() for label in left.get_yticklabels()]
    assert labels == ["teacher", "before training", "a+b", "c"]
    assert [text.get_text() for text in left.texts] == ["9.000 ▸"]
    assert left.get_xlim()[0] < 1.0 < 1.4 < left.get_xlim()[1] < 9.0
    squares = [line for line in left.lines if line.get_marker() == "s"]
    assert [list(square.get_xydata()[0]) for square in squares] == [[1.0, 0.0]]


def test_nothing_in_common_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no quality was measured for all"):
        draw_dots({"a": method(1.0), "b": {}}, tmp_path / "a.png")
