"""What a run says beyond its measures."""

from typing import Any

import pytest

from potstill.core.card import BEFORE_TRAINING
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES
from potstill.stages.run_notes import report_outcome, report_passes
from potstill.train.config import TrainConfig


@pytest.mark.parametrize(
    ("length", "text"),
    [
        ({"tokens": 200}, ""),
        (
            {"tokens": 201},
            "note: 201 tokens pass 2.0 times over the 100 tokens of the text; more text, or fewer --tokens",
        ),
        ({"epochs": 2.0}, ""),
        (
            {"epochs": 3.0},
            "note: 300 tokens pass 3.0 times over the 100 tokens of the text; more text, or fewer --epochs",
        ),
    ],
)
def test_more_than_two_passes_are_noted(capsys: pytest.CaptureFixture[str], length: dict[str, Any], text: str) -> None:
    report_passes(TrainConfig(**length), 100)
    shown = capsys.readouterr().err
    assert shown.startswith(text)
    assert bool(shown) == bool(text)


@pytest.mark.parametrize(
    ("trained", "kl", "texts"),
    [
        pytest.param(1000, 0.3, [], id="all is well"),
        pytest.param(899, 0.3, ["note: the run trained 899 tokens in place of 1,000"], id="a short run"),
        pytest.param(1000, 0.6, ["warning: the student ends further from the teacher (KL 0.600 nats)"], id="worse"),
        pytest.param(1000, None, [], id="no teacher to compare with"),
    ],
)
def test_a_short_run_is_noted_and_a_worse_student_warned_of(
    capsys: pytest.CaptureFixture[str], trained: int, kl: float | None, texts: list[str]
) -> None:
    def measures(value: float | None) -> list[Measure]:
        return [] if value is None else [MEASURES["teacher_kl"].build(value, 9)]

    report_outcome(1000, trained, {BEFORE_TRAINING: measures(0.5), "out": measures(kl)}, student="out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(texts)
    assert all(line.startswith(text) for line, text in zip(lines, texts, strict=True))


@pytest.mark.parametrize("prefers_chosen", [True, False])
def test_chosen_answers_that_become_less_likely_are_noted_where_they_are_preferred(
    capsys: pytest.CaptureFixture[str], prefers_chosen: bool
) -> None:
    before, after = ([MEASURES["chosen_log_p"].build(value, 9)] for value in (-10.0, -12.0))
    report_outcome(1, 1, {BEFORE_TRAINING: before, "out": after}, student="out", prefers_chosen=prefers_chosen)
    assert ("chosen answers are less likely than before" in capsys.readouterr().err) == prefers_chosen
