"""What is selected: preferences by agreement, prompts that are solved now and then, and solutions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.candidates.test_config import rows_of
from tests.stages.world import written

from potstill.core.errors import DataError
from potstill.data.preferences import load_preferences
from potstill.data.prompt_rows import load_prompts
from potstill.models.load import load_model
from potstill.stages.candidates.config import CandidatesConfig
from potstill.stages.candidates.questions import find_pivot_questions, load_questions
from potstill.stages.candidates.sampler import Candidate, CandidateSampler
from potstill.stages.candidates.select_mixed import schedule
from potstill.stages.candidates.select_preferences import NO_AGREEMENT, choose_pair, count_right
from potstill.stages.candidates.selection import NO_SAMPLES
from potstill.stages.candidates.solve import list_rounds


def test_pairs_are_preferences_with_the_id_of_their_question(stage: CandidatesConfig, tmp_path: Path) -> None:
    card = replace(stage, select="prefer", reward="accuracy", consistency="text", samples=8, max_tokens=12).run(
        tmp_path / "made"
    )
    rows = rows_of(tmp_path / "made")
    assert card["details"]["pairs"] == len(rows) > 3
    assert card["details"]["languages"] == {"fr": len(rows)}
    for row in rows:
        assert row["prompt"] == [{"role": "user", "content": f"Combien font {row['id']} + 1 ?"}]
        assert row["chosen"][0]["content"] != row["rejected"][0]["content"]
    held_out = rows_of(tmp_path / "made", "validation")
    assert not {row["id"] for row in held_out} & {row["id"] for row in rows}
    assert len(load_preferences(str(tmp_path / "made")).documents) == len(rows)


@pytest.mark.slow
def test_pairs_of_the_pivot_language_are_written_on_request(stage: CandidatesConfig, tmp_path: Path) -> None:
    changes: Any = {"consistency": "text", "samples": 8, "max_tokens": 12, "pivot_pairs": True, "documents": 4}
    details = replace(stage, select="prefer", reward="accuracy", **changes).run(tmp_path / "made")["details"]
    assert set(details["languages"]) == {"en", "fr"}


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(text, ended=True) for text in texts]


def test_an_answer_that_was_cut_takes_no_part(stage: CandidatesConfig) -> None:
    def choose(pivots: Sequence[Candidate], answers: Sequence[Candidate], **changes: Any) -> Any:
        return choose_pair(
            replace(stage, select="prefer", reward="accuracy", **changes),
            pivots,
            answers,
            lambda texts: torch.zeros(0, 1),
        )

    pivots = candidates("7", "7", "8")
    assert choose(pivots, candidates("7", "9")) == ("7", "9")
    assert choose(pivots, [Candidate("7", ended=False), *candidates("9", "8")]) == NO_AGREEMENT
    assert choose(candidates("8", "7", "7"), candidates("7", "8"), pivot_answer="first") == ("8", "7")
    assert choose(pivots, []) == choose([], candidates("7", "9")) == NO_SAMPLES


def test_pairs_are_checked_by_the_answers_of_their_rows() -> None:
    def row(chosen: str, rejected: str, answer: str | None = "7") -> dict[str, Any]:
        return {"chosen": [{"content": chosen}], "rejected": [{"content": rejected}], "answer": answer}

    rows = [row("7", "8"), row("8", "7"), row("7", "7.0"), row("7", "none"), row("7", "8", None)]
    assert count_right(rows) == {"checked_pairs": 4, "right_pairs": 2}
    assert count_right(rows[-1:]) == {}


def test_data_without_languages_or_without_the_pivot_gives_no_pair(stage: CandidatesConfig, tmp_path: Path) -> None:
    prefer = replace(stage, select="prefer", reward="accuracy")
    rows: list[Any] = [{"prompt": f"{n}?", "answer": "1"} for n in range(6)]
    with pytest.raises(DataError, match="has no `language`, which --select prefer reads"):
        replace(prefer, data=str(written(tmp_path / "bare.jsonl", rows))).run(tmp_path / "made")
    with pytest.raises(DataError, match=r"no pair of answers results .* version in ja"):
        replace(prefer, pivot="ja").run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_prompts_with_some_right_samples_are_kept_with_their_rows(stage: CandidatesConfig, tmp_path: Path) -> None:
    details = stage.run(tmp_path / "made")["details"]
    rows = rows_of(tmp_path / "made")
    data = load_questions(stage)
    assert all(0 < row["right"] < row["samples"] == 4 for row in rows)
    assert len(rows) + sum(details["left_out"].values()) == len(data.train)
    assert details["prompts"] == len(rows) == sum(details["languages"].values()) > 3
    assert all(row["english"] == f"What is {row['id']} + 1?" for row in rows)
    assert {row["answer"] for row in rows} <= {str(n) for n in range(1, 11)}
    held_out = rows_of(tmp_path / "made", "validation")
    assert {row["id"] for row in held_out} == {question.row["id"] for question in data.validation}
    assert load_prompts(str(tmp_path / "made")).kind == "prompts"


def test_no_mixed_prompt_is_an_error_that_counts_the_reasons(
    stage: CandidatesConfig, rewards: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"solved by some of 4 samples and missed by others \(\d+ never right"):
        replace(stage, reward=f"{rewards}:never").run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_language_is_topped_up_from_the_tier_below(stage: CandidatesConfig, tmp_path: Path) -> None:
    details = replace(stage, per_language=4).run(tmp_path / "made")["details"]
    rows = rows_of(tmp_path / "made")
    assert max(details["languages"].values()) <= 4
    assert [row["tier"] for row in rows] == sorted((row["tier"] for row in rows), reverse=True)
    assert {row["tier"] for row in rows} == {0, 1}
    assert len(rows) + sum(details["left_out"].values()) == len(load_questions(stage).train)


def test_a_full_language_is_not_sampled_again(stage: CandidatesConfig) -> None:
    questions = load_questions(stage).train
    counts = {"en": 0, "fr": 0}
    tiers = []
    for part in schedule(questions, counts, 2):
        tiers += [question.row["tier"] for question in part]
        assert counts["en"] < 2 or all(question.language == "fr" for question in part)
        counts["en"] = 2
    assert tiers == sorted(tiers, reverse=True)
    assert [question for part in schedule(questions, {}, 0) for question in part] == list(questions)


def test_the_prompts_of_an_earlier_round_are_left_out(stage: CandidatesConfig, rewards: Path, tmp_path: Path) -> None:
    stage.run(tmp_path / "first")
    used = {row["id"] for row in rows_of(tmp_path / "first")}
    other = next(q for q in load_questions(stage).train if q.row["id"] not in used)
    written(tmp_path / "other.jsonl", [dict(other.row)])
    for exclude, count in (((), 0), ((str(tmp_path / "other.jsonl"),), 1)):
        second = replace(stage, exclude=(str(tmp_path / "first"), *exclude), reward=f"{rewards}:never")
        left_out = 2 * (len(used) + count)
        with pytest.raises(DataError, match=f"{left_out} excluded, {18 - left_out} never right"):
            second.run(tmp_path / "second")


def test_excluded_data_without_ids_is_known_by_its_text(
    stage: CandidatesConfig, rewards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = load_questions(stage).train
    stage = replace(stage, reward=f"{rewards}:never")
    for text, count in ((questions[0].text, 2), ("What is 99 + 1?", 0)):
        used = written(tmp_path / "cold.jsonl", [{"prompt": text, "response": "1"}])
        with pytest.raises(DataError, match=f"{count} excluded, {18 - count}" if count else "[(]18 never right"):
            replace(stage, exclude=(str(used),)).run(tmp_path / "second")
        assert ("so none is left out" in capsys.readouterr().err) == (count == 0)


def test_a_tier_that_is_no_number_is_refused(stage: CandidatesConfig, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"{n}?", "answer": "1", "tier": "hard"} for n in range(6)]
    with pytest.raises(DataError, match="has the tier 'hard'; give numbers, the hardest the highest"):
        replace(stage, per_language=1, data=str(written(tmp_path / "bare.jsonl", rows))).run(tmp_path / "made")


def test_solutions_are_drawn_in_rounds_and_shared_by_all_versions(stage: CandidatesConfig, tmp_path: Path) -> None:
    stage = replace(stage, select="solve", samples=6)
    details = stage.run(tmp_path / "made")["details"]
    rows = rows_of(tmp_path / "made")
    assert len(rows) == details["prompts"] == len(load_questions(stage).train)
    held_out = rows_of(tmp_path / "made", "validation")
    by_id: dict[int, set[str]] = {}
    for row in rows:
        by_id.setdefault(row["id"], set()).add(row.get("solution", ""))
    assert all(len(solutions) == 1 for solutions in by_id.values())
    solved = [solution for solutions in by_id.values() for solution in solutions if solution]
    assert all(any(map(str.isupper, solution)) for solution in solved)
    assert details["with_solution"] == 2 * len(solved) > 4
    rounds = details["rounds"]
    held_out_solutions = {row["id"]: row.get("solution", "") for row in held_out}
    assert sum(rounds.values()) == len(by_id) + len(held_out_solutions)
    assert rounds["1"] > 0
    is_solved = [bool(solution) for solution in held_out_solutions.values()]
    assert rounds["unsolved"] == len(by_id) - len(solved) + is_solved.count(False)
    assert any(is_solved)


def test_no_more_held_out_questions_are_solved_than_asked_for(stage: CandidatesConfig, tmp_path: Path) -> None:
    details = replace(stage, select="solve", samples=1, documents=1).run(tmp_path / "made")["details"]
    assert len({question.key for question in load_questions(stage).validation}) == 1
    assert sum(details["rounds"].values()) == 2


def test_a_row_with_a_solution_keeps_it(stage: CandidatesConfig, rewards: Path, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": f"{n} ?", "language": "fr", "english": f"{n}?", "solution": "x" if n < 5 else None} for n in range(9)
    ]
    data = str(written(tmp_path / "half.jsonl", rows))
    details = replace(stage, select="solve", samples=1, data=data, reward=f"{rewards}:never").run(tmp_path / "made")
    solved = [row for row in rows_of(tmp_path / "made") if row.get("solution")]
    assert {row["solution"] for row in solved} == {"x"}
    assert details["details"]["with_solution"] == len(solved)


def test_solutions_need_a_version_in_the_pivot_language(stage: CandidatesConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prompt of .* has a version in 'de'; add rows with the same `id`"):
        replace(stage, select="solve", pivot="de").run(tmp_path / "made")


def test_rounds_grow_to_the_number_of_samples() -> None:
    assert list_rounds(32) == (1, 8, 16, 32)
    assert list_rounds(4) == (1, 4)
    assert list_rounds(1) == (1,)


def test_samples_of_a_round_follow_those_of_the_rounds_before(stage: CandidatesConfig, tmp_path: Path) -> None:
    questions = load_questions(stage).train[:3]

    def draw(count: int, first: int, folder: str) -> list[list[Candidate]]:
        (tmp_path / folder).mkdir()
        sampler = CandidateSampler(load_model(stage.model), stage, tmp_path / folder)
        return sampler.draw(questions, count, first=first)

    together, later = draw(4, 0, "a"), draw(2, 2, "b")
    assert [group[2:] for group in together] == later
    assert len({candidate.text for group in together for candidate in group}) > 6


def test_a_prompt_that_is_too_long_has_no_samples(stage: CandidatesConfig, tmp_path: Path) -> None:
    (question, other) = load_questions(stage).train[:2]
    long = question._replace(messages=[{"role": "user", "content": "x" * 300}])
    sampler = CandidateSampler(load_model(stage.model), stage, tmp_path)
    assert [len(group) for group in sampler.draw([long, other], 2)] == [0, 2]


def test_versions_of_a_question_are_held_out_together(stage: CandidatesConfig) -> None:
    data = load_questions(stage)
    keys = [{question.key for question in part} for part in (data.train, data.validation)]
    assert len(data.train) + len(data.validation) == 20
    assert not keys[0] & keys[1]
    assert all(len([q for q in data.all if q.key == key]) == 2 for key in keys[0] | keys[1])
    few = load_questions(replace(stage, documents=3)).train
    assert len({question.key for question in few}) == 3
    assert len(few) == 6


def test_the_pivot_is_a_row_or_the_column_english(stage: CandidatesConfig, tmp_path: Path) -> None:
    questions = load_questions(stage).train
    versions = find_pivot_questions(questions, "en")
    assert {version.text for version in versions.values()} == {q.text for q in questions if q.language == "en"}
    french = [q._replace(row={**q.row, "english": "How many?"}) for q in questions if q.language == "fr"]
    assert {version.text for version in find_pivot_questions(french, "en").values()} == {"How many?"}
    assert find_pivot_questions(french, "de") == {}
    assert {version.language for version in find_pivot_questions(french, "en").values()} == {"en"}
