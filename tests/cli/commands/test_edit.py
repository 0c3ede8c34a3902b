"""`potstill edit` as a shell calls it."""

import json
from pathlib import Path

from tests.cli.conftest import Call
from tests.stages.test_edit import FACTS
from tests.stages.world import written

SMALL = ("--top", 20, "--steps", 2, "--paraphrases", 0, "--max-tokens", 3)


def test_a_table_of_languages_and_the_folder(potstill: Call, teacher: Path, tmp_path: Path) -> None:
    facts, out = written(tmp_path / "facts.jsonl", FACTS), tmp_path / "edited"
    answer = potstill("edit", teacher, "--facts", facts, "--languages", "en,fr", "--out", out, *SMALL)
    assert answer.code == 0, answer.err
    assert "reliability" in answer.out
    assert "before, en" in answer.out
    *_, learned, place = [line for line in answer.out.splitlines() if line]
    assert learned.endswith("questions without their subject: 1")
    assert place == f"{out} contains edits.safetensors, edits.json and card.json"
    assert "note: 1 question does not name its subject, so the whole question is the trigger" in answer.err
    written_text = potstill("generate", out, "--prompt", "Where is Rome?", "--max-tokens", 4, "--json")
    assert written_text.code == 0, written_text.err
    assert json.loads(written_text.out)["model"] == str(out)


def test_json_and_a_dry_run_that_can_be_repeated(potstill: Call, teacher: Path, tmp_path: Path) -> None:
    facts, out = written(tmp_path / "facts.jsonl", FACTS), tmp_path / "edited"
    answer = potstill("edit", teacher, "--facts", facts, "--facts", facts, "--out", out, "--dry-run", "--json", *SMALL)
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["facts"] == 2
    assert not out.exists()
    answer = potstill("edit", teacher, "--config", tmp_path / "edited.yaml", "--limit", 1, "--no-measure", "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert (result["details"]["facts"], result["measures"]) == (1, {})
    assert result["stage"]["facts"] == [str(facts), str(facts)]


def test_what_is_wrong_is_one_sentence(potstill: Call, teacher: Path, tmp_path: Path) -> None:
    rows = written(tmp_path / "facts.jsonl", [{"prompt": "Where is Rome?"}])
    answer = potstill("edit", teacher, "--facts", rows, "--out", tmp_path / "edited")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.splitlines()[-1].startswith("error: ")
    assert answer.err.splitlines()[-1].endswith("line 1 has no target; a fact has subject, prompt and target")
    assert not (tmp_path / "edited").exists()
