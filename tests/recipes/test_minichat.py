"""MiniChat with preferences: fine-tuning, then DPO of what it made."""

from pathlib import Path

import pytest
from tests.stages.world import written

from potstill.cli.commands import run as cli
from potstill.core.errors import UsageError
from potstill.recipes.registry import get_recipe
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import run_stages


def test_preferences_add_dpo_after_the_fine_tuning(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {n} odd?", "chosen": "Yes." if n % 2 else "No.", "rejected": f"{n}?"} for n in range(40)]
    preferences = written(tmp_path / "preferences.jsonl", rows)
    recipe = get_recipe("minichat", tiny=True)
    options = {"teacher": str(teacher), "data": str(pairs), "tokens": 256}
    assert [stage.kind for stage in recipe.override(**options).stages] == ["distill"]
    chosen = recipe.override(**options, preferences=str(preferences))
    result = run_stages(chosen.stages, tmp_path / "made")
    stage = result.card["stage"]
    assert (result.out.name, stage["model"]) == ("2-align", str(tmp_path / "made/1-distill"))
    assert (stage["objective"], stage["settings"]["neftune"]) == ("dpo:beta=0.1", 0.0)
    assert result.card["data"]["kind"] == "preferences"
    template = (result.out / "chat_template.jinja").read_text()
    assert template == (tmp_path / "made/1-distill/chat_template.jinja").read_text()
    assert "[|User|]" in template


def test_preferences_are_for_recipes_that_read_them() -> None:
    with pytest.raises(UsageError, match="gkd takes no --preferences; omit it"):
        get_recipe("gkd").override(data="chats.jsonl", preferences="pairs.jsonl")


def test_a_draft_vocabulary_is_for_the_fine_tuning_where_that_is_last() -> None:
    recipe = get_recipe("minichat")
    stages = recipe.override(data="chats.jsonl", draft_vocabulary=16000).stages
    assert [stage.draft_vocabulary for stage in stages if isinstance(stage, DistillConfig)] == [16000]
    with pytest.raises(UsageError, match="minichat ends in no distillation, so it takes no --draft-vocabulary"):
        recipe.override(data="chats.jsonl", preferences="pairs.jsonl", draft_vocabulary=16000)


def test_the_command_takes_preferences_beside_its_data(tmp_path: Path) -> None:
    out, options = str(tmp_path / "made"), {"dry_run": True, "as_json": True}
    tuned, aligned = cli.run("minichat", out, data=["a.jsonl"], preferences=["b.jsonl"], **options)["stages"]
    assert (tuned["data"], aligned["data"], aligned["model"]) == ("a.jsonl", "b.jsonl", "@previous")
    assert "preferences: b.jsonl" in (tmp_path / "made.yaml").read_text()
