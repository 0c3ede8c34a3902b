"""What `distill` says, or refuses, before it begins."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import ArtifactError
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.train.config import TrainConfig

Usage = namedtuple("Usage", ["total", "used", "free"])
SETTINGS = TrainConfig(tokens=512, context=64, batch_tokens=128, micro_tokens=64)


@pytest.fixture
def stage(teacher: Path, text: Path) -> DistillConfig:
    return DistillConfig(
        teacher=str(teacher), keep=0.755, data=str(text), settings=SETTINGS, dtype="float32", documents=2
    )


def test_a_disk_without_room_is_refused_before_anything_is_written(
    stage: DistillConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ArtifactError, match=r"takes 0\.00 GiB of disk or more, and .*; make room"):
        distill(stage, tmp_path / "made", show=False)
    assert not (tmp_path / "made").exists()


def test_too_little_memory_is_said_and_not_refused(
    stage: DistillConfig, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("potstill.stages.resources.machine.read_available_memory", lambda: 1000)
    distill(stage, tmp_path / "made", show=False)
    assert "of memory can be had; potstill plan says what to change" in capsys.readouterr().err
    assert (tmp_path / "made" / "card.json").is_file()


def test_a_run_that_is_watched_says_what_it_takes_and_another_is_quiet(
    stage: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(stage, tmp_path / "watched", show=True)
    assert "note: the run takes about" in capsys.readouterr().err
    distill(stage, tmp_path / "quiet", show=False)
    assert "note" not in capsys.readouterr().err
