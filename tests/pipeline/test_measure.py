"""Measuring side by side: which text is read, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from potstill.core.errors import UsageError
from potstill.pipeline.measure import Measurement


@pytest.fixture
def measurement(teacher: Path, pairs: Path) -> Measurement:
    return Measurement(models=(str(teacher),), data=str(pairs), context=64, speed=False, prompts=2)


def documents(measurement: Measurement) -> int:
    (measures,) = measurement.run()["models"].values()
    return next(m["n"] for m in measures if m["name"] == "bits_per_byte")


def test_a_file_is_read_whole_only_where_that_is_said(measurement: Measurement) -> None:
    held_out, seen, whole = (documents(replace(measurement, split=split)) for split in ("validation", "train", "all"))
    assert held_out + seen == whole == 60
    assert held_out < seen


def test_answers_are_judged_where_something_is_asked(measurement: Measurement, text: Path) -> None:
    names = [
        {m["name"] for m in measures}
        for data in (measurement.data, str(text))
        for measures in replace(measurement, data=data).run()["models"].values()
    ]
    assert ["rouge_l" in found for found in names] == [True, False]


def test_a_split_that_is_none_and_a_context_too_long(measurement: Measurement) -> None:
    with pytest.raises(UsageError, match="validation"):
        replace(measurement, split="test").run()
    with pytest.raises(UsageError, match="longer than the 512 tokens"):
        replace(measurement, context=1024).run()
