"""`potstill advise` as a shell calls it."""

import json
from pathlib import Path

from tests.cli.conftest import Call

SMALL = ("--draft-length", "1,2", "--prompts", 2, "--max-tokens", 8, "--runs", 1, "--dtype", "float32")


def test_advice_is_a_sentence_behind_its_tables(potstill: Call, teacher: Path, pairs: Path, tmp_path: Path) -> None:
    answer = potstill("advise", teacher, "--data", pairs, "--draft", "lookup", "--out", tmp_path / "a", *SMALL)
    assert answer.code == 0, answer.err
    *_, conditions, sentence, place = [line for line in answer.out.splitlines() if line]
    assert "2 prompts, one at a time, float32" in conditions
    assert "times as fast as without drafts" in sentence
    assert place == f"{tmp_path / 'a'} contains advice.json and the chart speed-up.html"
    assert "lookup, 2" in answer.out
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"advice.json", "speed-up.html"}


def test_a_file_of_options_and_json(potstill: Call, teacher: Path, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "options.yaml"
    config.write_text("draft: [suffix, 'exit:1']\ndraft_length: [1, 2]\ncheck: false\nprompts: 2\nmax_tokens: 8\n")
    answer = potstill("advise", teacher, "--data", text, "--config", config, "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert set(result) == {
        *("model", "data", "conditions", "plain_seconds", "verification_cost", "drafts", "settings", "advice", "stage")
    }
    assert [setting["flags"] for setting in result["settings"]] == [
        f"--draft {draft} --draft-length {length}" for draft in ("suffix", "exit:1") for length in (1, 2)
    ]
    assert set(result["advice"]) == {"speculate", "flags", "speed_up", "sentence"}


def test_a_dry_run_lists_the_settings(potstill: Call, teacher: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    answer = potstill("advise", teacher, "--data", pairs, "--tree", "2,1", "--out", out, "--dry-run", "--json", *SMALL)
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["settings"][-1] == "--draft suffix --tree 2,1"
    assert not out.exists()
    answer = potstill("advise", "--config", tmp_path / "a.yaml", "--dry-run", teacher, "--data", pairs)
    assert answer.code == 0, answer.err
    assert "--draft lookup --draft-length 2" in " ".join(answer.out.split())
