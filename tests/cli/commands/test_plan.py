"""`potstill plan` as a shell calls it."""

import json
from pathlib import Path

import pytest
from tests.cli.conftest import KEEP, TINY, Call


def test_people_see_sentences_and_machines_one_document(potstill: Call, teacher: Path, text: Path) -> None:
    call = ("plan", "--teacher", teacher, "--keep", KEEP, "--data", text, *TINY, "--no-measure")
    answer = potstill(*call)
    assert answer.code == 0
    for said in ("time: ", "memory: ", "disk: ", "law of capacity gap: no teacher", "plan ran no step"):
        assert said in answer.out
    assert json.loads(potstill(*call, "--json").out)["parameters"]["student"]["total"] > 0


@pytest.mark.slow
def test_a_plan_takes_a_card_of_a_distillation_though_it_says_more_than_a_plan_asks(
    potstill: Call, teacher: Path, text: Path, tmp_path: Path
) -> None:
    run = ("--teacher", teacher, "--keep", KEEP, "--data", text, *TINY)
    stage = json.loads(
        potstill("distill", *run, "--documents", 7, "--out", tmp_path / "made", "--dry-run", "--json").out
    )["stage"]
    (tmp_path / "card.json").write_text(json.dumps({"stage": stage}))
    call = ("plan", "--config", tmp_path / "card.json", "--no-measure", "--json")
    assert json.loads(potstill(*call).out)["stage"]["settings"] == stage["settings"]
    (tmp_path / "card.json").write_text(json.dumps({"documents": 7}))
    assert "'documents', which is not an option" in potstill(*call).err


@pytest.mark.slow
def test_rates_can_be_kept_and_used_again(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> None:
    call = ("plan", "--teacher", teacher, "--data", text, *TINY, "--json")
    first = potstill(*call, "--keep", KEEP, "--no-measure").out
    (tmp_path / "plan.json").write_text(first)
    second = json.loads(potstill(*call, "--student", teacher, "--calibration", tmp_path / "plan.json").out)
    assert second["calibration"] == json.loads(first)["calibration"]


def test_what_is_no_calibration_is_refused(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> None:
    call = ("plan", "--teacher", teacher, "--keep", KEEP, "--data", text, *TINY, "--calibration")
    assert "there is no file" in potstill(*call, tmp_path / "nowhere.json").err
    (tmp_path / "other.json").write_text("[]")
    answer = potstill(*call, tmp_path / "other.json")
    assert (answer.code, answer.out) == (1, "")
    assert "has no calibration" in answer.err


def test_a_size_is_needed(potstill: Call, teacher: Path, text: Path) -> None:
    answer = potstill("plan", "--teacher", teacher, "--data", text, *TINY)
    assert answer.code == 2
    assert "a size is needed" in answer.err
