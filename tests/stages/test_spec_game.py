"""The game of draft sizes and lengths on a model: its card, its page, and drafts of one's own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import UsageError
from potstill.stages.spec_game import PAGE_FILE, SpecGameConfig


@pytest.fixture
def stage(teacher: Path, pairs: Path) -> SpecGameConfig:
    return SpecGameConfig(
        model=str(teacher), data=str(pairs), draft_length="1,3", documents=2, max_tokens=12, dtype="float32"
    )


def test_the_card_has_every_draft_at_its_best_length_and_the_page_all_lengths(
    stage: SpecGameConfig, tmp_path: Path
) -> None:
    card = stage.run(tmp_path / "made")
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"card.json", PAGE_FILE}
    assert json.loads((tmp_path / "made" / "card.json").read_text())["stage"] == stage.to_dict()
    assert set(card.measures) == {"exit:1", "exit:2"}  # of three layers
    names = [measure.name for measure in card.measures["exit:1"]]
    assert names == ["acceptance", "tokens_per_pass", "predicted_speed_up", "speed_up"]
    small, large = card.details["drafts"]
    assert 0 < small["parameter_share"] < large["parameter_share"] < 1
    assert set(small["practice"]["by_length"]) == set(small["theory"]["by_length"]) == {1, 3}
    page = (tmp_path / "made" / PAGE_FILE).read_text()
    assert "exit:2, 3" in page
    assert card.details["summary"].split(",")[0] in page


def test_drafts_of_ones_own_take_the_place_of_exits(stage: SpecGameConfig, tmp_path: Path) -> None:
    card = replace(stage, drafts=("lookup", "skip:1"), check=False).run(tmp_path / "made")
    assert set(card.measures) == {"lookup", "skip:1"}
    assert [entry["parameter_share"] is None for entry in card.details["drafts"]] == [True, False]
    assert "speed_up" not in [measure.name for measure in card.measures["lookup"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"exits": ()}, "there is no draft"),
        ({"exits": (0.5, 1.0)}, "each is a share of the depth"),
        ({"draft_length": "0"}, "--draft-length"),
        ({"max_tokens": 1}, "--max-tokens is 1"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, Any], words: str, stage: SpecGameConfig) -> None:
    with pytest.raises(UsageError, match=words):
        replace(stage, **change)
