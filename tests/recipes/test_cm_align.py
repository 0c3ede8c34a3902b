"""CM-Align from parallel prompts to an aligned model."""

import json
from pathlib import Path

import pytest
from tests.recipes.conftest import DIGITS

import potstill
from potstill.core.errors import UsageError
from potstill.recipes.registry import get_recipe

QUESTIONS = {"en": "What is {} - {}?", "fr": "Combien font {} - {} ?"}


def test_a_policy_is_aligned_with_its_own_answers(guesser: Path, tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "language": language, "prompt": text.format(n + 1, n), "answer": DIGITS[0]}
        for n in range(40)
        for language, text in QUESTIONS.items()
    ]
    result = potstill.run("cm-align", tiny=True, teacher=guesser, data=rows, tokens="1024", out=tmp_path / "made")
    assert result.out == str(tmp_path / "made/2-align")
    pairs = [json.loads(line) for line in (tmp_path / "made/1-candidates/train.jsonl").read_text().splitlines()]
    assert {pair["language"] for pair in pairs} == {"fr"}
    assert 0 < len(pairs) <= 16
    for pair in pairs:
        assert len({pair[side][0]["content"] for side in ("chosen", "rejected")}) == 2
    assert result.stage["data"] == str(tmp_path / "made/1-candidates")
    assert result.stage["objective"] == "dpo:beta=0.1,nll=0.2"
    names = {measure["name"] for measure in result.measures["2-align"]}
    assert {"preference_loss", "reward_accuracy"} <= names


def test_it_needs_parallel_prompts_and_no_judge() -> None:
    recipe = get_recipe("cm-align")
    with pytest.raises(UsageError, match="cm-align reads prompts in several languages; give --data"):
        recipe.override()
    with pytest.raises(UsageError, match="cm-align takes no --judge; omit it"):
        recipe.override(data="parallel.jsonl", judge="http://localhost:8000/v1")
    with pytest.raises(UsageError, match="cm-align takes no --questions; omit it"):
        recipe.override(data="parallel.jsonl", questions="questions.jsonl")
