"""Stages one after another."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from potstill.core.atomic_files import CARD_FILE
from potstill.core.errors import OutputExists, UsageError
from potstill.stages.distill.config import DistillConfig
from potstill.stages.prune import PruneConfig
from potstill.stages.sequence import PREVIOUS_FOLDER, is_finished, resolve_folders, run_stages
from potstill.stages.stage import reproducible_options
from potstill.train.config import TrainConfig


@pytest.fixture
def stages(teacher: Path, text: Path) -> tuple[PruneConfig | DistillConfig, ...]:
    settings = TrainConfig(tokens=256, context=64, batch_tokens=128)
    return (
        PruneConfig(model=str(teacher), data=str(text), keep=0.755, calibration_tokens=256),
        DistillConfig(teacher=str(teacher), student=PREVIOUS_FOLDER, data=str(text), settings=settings, documents=4),
    )


def stamps(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


def test_each_stage_has_a_folder_and_starts_from_the_one_before(
    stages: tuple[PruneConfig | DistillConfig, ...], tmp_path: Path
) -> None:
    done = run_stages(stages, tmp_path / "made")
    assert {f.name for f in (tmp_path / "made").iterdir()} == {"1-prune", "2-distill"}
    assert done.out == tmp_path / "made" / "2-distill"
    assert done.card["parents"][0]["name"] == str(tmp_path / "made" / "1-prune")
    assert done.to_dict() == {"out": str(done.out), **json.loads((done.out / "card.json").read_text())}
    assert set(done.measures) == {"teacher", "before training", "2-distill"}
    assert done.measures["teacher"][0].name == "bits_per_byte"


def test_finished_stages_are_not_made_again(
    stages: tuple[PruneConfig | DistillConfig, ...], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_stages(stages[:1], tmp_path / "made")
    first = stamps(tmp_path / "made")
    whole = run_stages(stages, tmp_path / "made", resume=True)
    both = stamps(tmp_path / "made")
    assert both.items() >= first.items()
    assert run_stages(stages, tmp_path / "made", resume=True) == whole
    assert stamps(tmp_path / "made") == both
    assert "has changed since" not in capsys.readouterr().err
    os.utime(text, (time.time() + 60,) * 2)
    run_stages(stages, tmp_path / "made", resume=True)
    assert f"1-prune is finished, though {text} has changed since" in " ".join(capsys.readouterr().err.split())


def test_a_finished_stage_of_another_plan_is_not_taken_for_this_one(
    stages: tuple[PruneConfig | DistillConfig, ...], tmp_path: Path
) -> None:
    run_stages(stages[:1], tmp_path / "made")
    with pytest.raises(OutputExists):
        run_stages([replace(stages[0], seed=2)], tmp_path / "made", resume=True)  # type: ignore[call-arg]


def test_what_stands_there_is_refused_or_overwritten(
    stages: tuple[PruneConfig | DistillConfig, ...], tmp_path: Path
) -> None:
    run_stages(stages[:1], tmp_path / "made")
    with pytest.raises(OutputExists, match="--overwrite"):
        run_stages(stages[:1], tmp_path / "made")
    before = stamps(tmp_path / "made")
    run_stages(stages[:1], tmp_path / "made", overwrite=True)
    assert stamps(tmp_path / "made") != before


def test_the_essence_of_a_stage_is_all_that_changes_a_result(stages: tuple[PruneConfig | DistillConfig, ...]) -> None:
    def of(**changes: object) -> object:
        stage = stages[1]
        assert isinstance(stage, DistillConfig)
        settings = {name: changes.pop(name) for name in ("compile", "seed") if name in changes}
        return reproducible_options(replace(stage, settings=replace(stage.settings, **settings), **changes).to_dict())

    assert of() == of(skip_doctor=True) == of(compile=True)
    assert of() != of(seed=2)
    assert of() != of(documents=5)


def test_no_stage_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run_stages([], tmp_path / "made")


def test_only_what_says_so_is_replaced(stages: tuple[PruneConfig | DistillConfig, ...]) -> None:
    assert resolve_folders(stages[0], [Path("there")]) == stages[0]
    placed = resolve_folders(stages[1], [Path("there")])
    assert isinstance(placed, DistillConfig)
    assert (placed.student, placed.teacher) == ("there", stages[1].to_dict()["teacher"])


def test_a_stage_that_was_begun_anew_is_not_finished(
    stages: tuple[PruneConfig | DistillConfig, ...], tmp_path: Path
) -> None:
    done = run_stages(stages, tmp_path / "made")
    stage = resolve_folders(stages[1], [tmp_path / "made" / "1-prune"])
    assert is_finished(done.out, stage)
    assert not is_finished(done.out, replace(stages[1], documents=5))
    (done.out / "training").mkdir()
    assert not is_finished(done.out, stage)


def test_a_card_that_is_older_than_an_option_still_counts_while_the_option_is_at_its_default(
    stages: tuple[PruneConfig | DistillConfig, ...], tmp_path: Path
) -> None:
    done = run_stages(stages, tmp_path / "made")
    stage = resolve_folders(stages[1], [tmp_path / "made" / "1-prune"])
    assert isinstance(stage, DistillConfig)
    card = json.loads((done.out / CARD_FILE).read_text())
    del card["stage"]["combine"], card["stage"]["settings"]["clip"]
    (done.out / CARD_FILE).write_text(json.dumps(card))
    assert is_finished(done.out, stage)
    assert not is_finished(done.out, replace(stage, settings=replace(stage.settings, clip=0.5)))
    del card["stage"]["data"]
    (done.out / CARD_FILE).write_text(json.dumps(card))
    assert not is_finished(done.out, stage)
