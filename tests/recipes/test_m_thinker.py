"""M-Thinker: a cold start and two rounds of questions, solutions and GRPO."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.recipes.conftest import DIGITS
from tests.stages.world import written

from potstill.core.errors import UsageError
from potstill.recipes.registry import get_recipe
from potstill.stages.align.config import AlignConfig
from potstill.stages.candidates.config import CandidatesConfig
from potstill.stages.sequence import run_stages


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_rounds_read_what_the_stages_before_them_wrote(guesser: Path, tmp_path: Path) -> None:
    asked = [f"Combien font {n} - {n - 1 - n % 2} ?" for n in range(2, 50)]
    rows = [
        {"prompt": text, "english": f"What is it? {n}", "answer": DIGITS[n % 2], "language": "fr", "id": f"q{n}"}
        for n, text in enumerate(asked)
    ]
    questions = written(tmp_path / "questions.jsonl", rows)
    cold = [{"prompt": f"Qui est {n} ?", "response": "<think>Oui.</think>Oui.", "id": f"q{n}"} for n in range(3)]
    cold += [{"prompt": f"Et {n} ?", "response": "<think>Non.</think>Non.", "id": f"c{n}"} for n in range(40)]
    data = written(tmp_path / "cold.jsonl", cold)
    recipe = get_recipe("m-thinker", tiny=True)
    chosen = recipe.override(teacher=str(guesser), data=str(data), questions=str(questions), tokens=512)
    out = tmp_path / "made"
    result = run_stages(chosen.stages, out)
    folders = sorted(folder.name for folder in out.iterdir())
    kinds = ("distill", *("candidates", "candidates", "align") * 2)
    assert folders == [f"{number}-{kind}" for number, kind in enumerate(kinds, 1)]
    first, solved, second = (read_rows(out / f"{number}-candidates") for number in (2, 3, 5))
    for rows_of_round in (first, second):
        assert all(0 < row["right"] < row["samples"] == 8 for row in rows_of_round)
    used = [{row["id"] for row in part} for part in (cold, first, second)]
    assert 0 < len(used[1]) <= 4
    assert not used[0] & used[1]
    assert used[2]
    assert not used[2] & (used[0] | used[1])
    assert {row["id"] for row in solved} == used[1]
    assert any(row.get("solution") for row in solved)
    stage = result.card["stage"]
    assert (stage["model"], stage["data"]) == (str(out / "4-align"), str(out / "6-candidates"))
    assert chosen.stages[-1].settings.prompts_per_step == 512
    assert stage["settings"]["prompts_per_step"] == len(read_rows(out / "6-candidates"))
    assert {"sampled_reward", "cut_samples"} <= {measure["name"] for measure in result.card["measures"]["7-align"]}


def test_its_values_are_those_of_the_released_code() -> None:
    recipe = get_recipe("m-thinker").override(data="cold", questions="asked", judge="http://localhost:8000/v1#J")
    policies = [stage for stage in recipe.stages if isinstance(stage, AlignConfig)]
    selections = [stage for stage in recipe.stages if isinstance(stage, CandidatesConfig)]
    for policy in policies:
        assert policy.reward == "m_thinker:judge=http://localhost:8000/v1#J"
        settings = policy.settings
        assert (settings.learning_rate, settings.packs_per_step, settings.epochs) == (5e-6, 512, 15.0)
        assert (policy.samples, policy.objective) == (8, "grpo:temperature=0.9,normalization=tokens")
    assert [stage.select for stage in selections] == ["mixed", "solve"] * 2
    assert [stage.exclude for stage in selections] == [("cold",), (), ("cold", "@2"), ()]
    assert {(stage.temperature, stage.top_p, stage.reward) for stage in selections} == {
        (0.9, 0.95, "accuracy+language")
    }
    assert [stage.per_language for stage in selections] == [3000, 0] * 2


def test_a_model_of_a_short_context_is_refused_before_the_first_stage(guesser: Path, tmp_path: Path) -> None:
    data = str(written(tmp_path / "data.jsonl", [{"prompt": "?", "response": "."}]))
    recipe = get_recipe("m-thinker").override(teacher=str(guesser), data=data, questions=data)
    with pytest.raises(UsageError, match=r"stage 4 aligns in a context of 8,192 tokens, and .*guesser has one of 512"):
        run_stages(recipe.stages, tmp_path / "made")
    assert not list((tmp_path / "made").glob("*"))


def test_it_needs_questions_beside_its_data() -> None:
    with pytest.raises(UsageError, match="m-thinker reads questions; give --questions"):
        get_recipe("m-thinker").override(data="cold.jsonl")
    with pytest.raises(UsageError, match="m-thinker reads prompts with responses, or chats; give --data"):
        get_recipe("m-thinker").override(questions="questions.jsonl")
