import json
from itertools import combinations

import matplotlib.image
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from potstill.core.errors import DataError
from potstill.core.measure import Measure
from potstill.evaluate.charts.curve import draw_curve
from potstill.evaluate.charts.frontier import Point
from potstill.evaluate.charts.plots import draw_frontier, log_ticks


def point(name, size, bits, speed, parent=None):
    measures = (
        Measure("parameters", size, "parameters", 1),
        Measure("bits_per_byte", bits, "bits/byte", 9, low=0.97 * bits, high=1.03 * bits),
        Measure("decode_tokens_per_second", speed, "tokens/s", 5, "higher", low=0.9 * speed, high=1.1 * speed),
    )
    return Point(name, {m.name: m for m in measures}, parent)


CHART = [
    point("SmolLM2-135M-Instruct (teacher)", 134.5e6, 1.13, 31.0),
    point("pruned to 75 %", 100.9e6, 2.93, 41.0, "SmolLM2-135M-Instruct (teacher)"),
    point("+ cross-entropy", 100.9e6, 1.26, 41.4, "pruned to 75 %"),
    point("+ distillation", 100.9e6, 1.22, 40.8, "pruned to 75 %"),
]
COSTS = ("parameters", "decode_tokens_per_second")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, as they were when they were."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def names(panel: Axes):
    return [text for text in panel.texts if text.get_text()]


def test_no_name_covers_another_or_is_cut(drawn, tmp_path):
    draw_frontier(CHART, tmp_path / "frontier.png", costs=COSTS, title="A title")
    assert matplotlib.image.imread(tmp_path / "frontier.png").std() > 0
    (figure,) = drawn
    for panel in figure.axes:
        frame, boxes = panel.get_window_extent(), [text.get_window_extent() for text in names(panel)]
        assert len(boxes) == 4
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        for box in boxes:
            assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
            assert frame.y0 <= box.y0 <= box.y1 <= frame.y1


def test_one_panel_for_each_cost_says_what_is_better(drawn, tmp_path):
    draw_frontier(CHART, tmp_path / "frontier.png", costs=COSTS)
    left, right = drawn[0].axes
    assert left.get_xlabel() == "parameters\nlower is better"
    assert right.get_xlabel() == "decode (tokens/s)\nhigher is better"
    assert left.get_ylabel() == "bits per byte\nlower is better, log scale"


def test_the_kl_to_the_teacher_is_drawn_where_two_models_have_it(drawn, tmp_path):
    measured = [
        Point(p.name, {**p.measures, "teacher_kl": Measure("teacher_kl", kl, "nats/token", 9)}, p.parent)
        for p, kl in zip(CHART[1:], (2.0, 0.5, 0.25), strict=True)
    ]
    draw_frontier([CHART[0], *measured], tmp_path / "frontier.png")
    draw_frontier([*CHART[:3], measured[2]], tmp_path / "bits.png")
    labels = [figure.axes[0].get_ylabel() for figure in drawn]
    assert labels[0] == "KL to the teacher (nats/token)\nlower is better, log scale"
    assert labels[1].startswith("bits per byte")


def test_intervals_are_drawn_as_bars(drawn, tmp_path):
    draw_frontier(CHART, tmp_path / "frontier.png", costs=["parameters"])
    (panel,) = drawn[0].axes
    tops = [segment[:, 1].max() for bars in panel.containers for line in bars[2] for segment in line.get_segments()]
    assert max(tops) == pytest.approx(2.93 * 1.03)


def test_dominated_models_are_hollow(drawn, tmp_path):
    draw_frontier(CHART, tmp_path / "frontier.png", costs=["parameters"])
    (panel,) = drawn[0].axes
    faces = [line.get_markerfacecolor() for line in panel.lines if line.get_marker() == "o"]
    assert [face == "white" for face in faces] == [False, True, True, False]


def test_a_model_without_a_measure_is_left_out_of_its_panel(drawn, tmp_path):
    bare = Point("bare", {k: v for k, v in CHART[0].measures.items() if k != "decode_tokens_per_second"})
    draw_frontier([bare, *CHART[1:]], tmp_path / "frontier.png", costs=COSTS)
    assert [len(names(panel)) for panel in drawn[0].axes] == [4, 3]


@pytest.mark.parametrize("chart", [CHART[:1], CHART[2:3]])
def test_a_single_model_is_drawn(tmp_path, chart):
    draw_frontier(chart, tmp_path / "frontier.png")


def test_a_measure_that_nobody_has_is_refused(tmp_path):
    with pytest.raises(DataError, match="no model has the measure rouge_l"):
        draw_frontier(CHART, tmp_path / "frontier.png", quality="rouge_l")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.0, 3000.0, [1, 10, 100, 1000]),
        (0.9, 12.0, [1, 2, 5, 10]),
        (1.05, 3.2, [1.5, 2, 2.5, 3]),
        (1.02, 1.41, [1.1, 1.2, 1.3, 1.4]),
        (9.1, 24.6, [10, 12, 14, 16, 18, 20]),
    ],
)
def test_logarithmic_ticks_are_round_and_at_least_four(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)


@pytest.fixture
def metrics(tmp_path):
    lines = [
        {"step": s, "tokens": 100 * s, "loss": 5 / s, "distill": 3 / s, "grad_norm": 1.0, "tokens_per_second": 9.0}
        for s in range(1, 61)
    ]
    lines += [{"step": s, "tokens": 100 * s, "eval_loss": 6 / s} for s in (20, 40, 60)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61, "tok', encoding="utf-8")
    return path


def test_the_curve_shows_every_loss_and_no_bookkeeping(metrics, drawn, tmp_path):
    draw_curve(metrics, tmp_path / "curve.png")
    assert matplotlib.image.imread(tmp_path / "curve.png").std() > 0
    (panel,) = drawn[0].axes
    assert [text.get_text() for text in panel.get_legend().get_texts()] == [
        "total loss",
        "distill",
        "total loss, held out",
    ]
    lines = {line.get_label(): line for line in panel.lines if not line.get_label().startswith("_")}
    assert lines["total loss, held out"].get_color() == lines["total loss"].get_color() != lines["distill"].get_color()
    assert lines["total loss, held out"].get_xydata().tolist() == [[2000, 0.3], [4000, 0.15], [6000, 0.1]]


def test_the_mean_of_a_curve_neither_lags_nor_leaves_its_range(metrics, drawn, tmp_path):
    draw_curve(metrics, tmp_path / "curve.png", terms=["loss"])
    (mean,) = (line for line in drawn[0].axes[0].lines if line.get_label() == "total loss")
    x, y = mean.get_data()
    assert y[0] == 5
    assert y[10] == pytest.approx(sum(5 / s for s in (10, 11, 12)) / 3)
    assert len(x) == 60


@pytest.mark.parametrize("text", ["", '{"step": 1, "tokens": 5}\n'])
def test_a_file_without_losses_is_refused(metrics, tmp_path, text):
    metrics.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="has no term over tokens"):
        draw_curve(metrics, tmp_path / "curve.png")
