"""Measuring side by side: which text is read, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.core.errors import UsageError
from potstill.stages.measure import MeasureConfig


@pytest.fixture
def measurement(teacher: Path, pairs: Path) -> MeasureConfig:
    return MeasureConfig(models=(str(teacher),), data=str(pairs), context=64, speed=False, prompts=2)


@pytest.fixture
def foreign(teacher: Path, tmp_path: Path) -> Path:
    """The teacher, with two letters of its tokenizer exchanged."""
    folder = shutil.copytree(teacher, tmp_path / "foreign")
    table = json.loads((folder / "tokenizer.json").read_text())
    words = table["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


def documents(measurement: MeasureConfig) -> int:
    (measures,) = measurement.run()["models"].values()
    return next(m["n"] for m in measures if m["name"] == "bits_per_byte")


def test_a_file_is_read_whole_only_where_that_is_said(measurement: MeasureConfig) -> None:
    held_out, seen, whole = (documents(replace(measurement, split=split)) for split in ("validation", "train", "all"))
    assert held_out + seen == whole == 60
    assert held_out < seen


def test_answers_are_judged_where_something_is_asked(measurement: MeasureConfig, text: Path) -> None:
    names = [
        {m["name"] for m in measures}
        for data in (measurement.data, str(text))
        for measures in replace(measurement, data=data).run()["models"].values()
    ]
    assert ["rouge_l" in found for found in names] == [True, False]


def test_a_model_with_another_tokenizer_is_measured_on_the_text_alone(
    measurement: MeasureConfig, foreign: Path
) -> None:
    both = replace(measurement, models=(str(foreign), *measurement.models), teacher=measurement.models[0])
    theirs, own = ({m["name"] for m in measures} for measures in both.run()["models"].values())
    assert own - theirs == {"teacher_kl", "teacher_agreement"}
    assert "bits_per_byte" in theirs


def test_a_split_that_is_none_and_a_context_too_long(measurement: MeasureConfig) -> None:
    with pytest.raises(UsageError, match="validation"):
        replace(measurement, split="test").run()
    with pytest.raises(UsageError, match="longer than the 512 tokens"):
        replace(measurement, context=1024).run()
