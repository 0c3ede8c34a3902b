"""Right solutions in the pivot language, in 1, 8, 16 and 32 samples, until one is right (M-Thinker).

The solution of a question is written into the column `solution` of all its versions. It is the thinking of the right
sample, or all of a sample without `</think>`. With it, `thinking` and `m_thinker` compare the thinking in other
languages.

Source: M-Thinker (arXiv:2510.07300) and its released code.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from potstill.core.errors import DataError
from potstill.stages.candidates.options import ROUNDS, CandidateOptions
from potstill.stages.candidates.questions import QuestionSet, check_columns, find_pivot_questions, select_first
from potstill.stages.candidates.sampler import CandidateSampler
from potstill.stages.candidates.selection import find_right
from potstill.stages.dataset_parts import GeneratedDataset
from potstill.train.rewards.thinking import SOLUTION_KEY, get_solution, get_thinking
from potstill.train.rewards.weighted import RewardSum

UNSOLVED = "unsolved"


def solve(
    options: CandidateOptions, sampler: CandidateSampler, data: QuestionSet, reward: RewardSum
) -> GeneratedDataset:
    """All rows, also the held-out ones, with a solution where one is found. A row that has one keeps it.

    Raises: DataError where no row has a version in the pivot language, or one lacks a column that the reward reads.
    """
    held_out = select_first(data.validation, options.documents)
    versions = find_pivot_questions([*data.train, *held_out], options.pivot)
    unsolved = [version for version in versions.values() if not get_solution(version.row)]
    if not versions:
        raise DataError(
            f"no prompt of {data.name} has a version in {options.pivot!r}; add rows with the same `id` in that "
            f"language, or a column `english`"
        )
    check_columns(unsolved, reward.columns, reader=f"--reward {options.reward}")
    solutions: dict[str, str] = {}
    tries: Counter[int | str] = Counter()
    first = 0
    for count in list_rounds(options.samples):
        for question, candidates in zip(unsolved, sampler.draw(unsolved, count, first=first), strict=True):
            right = find_right(reward, question, candidates)
            if any(right):
                solutions[question.key] = get_thinking(candidates[right.index(True)].text)
                tries[count] += 1
        first += count
        unsolved = [question for question in unsolved if question.key not in solutions]
    tries[UNSOLVED] = len(unsolved)
    train, validation = (
        [add_solution(dict(question.row), solutions.get(question.key)) for question in part]
        for part in (data.train, data.validation)
    )
    num_solved = sum(bool(get_solution(row)) for row in train)
    details = {"prompts": len(train), "with_solution": num_solved, "rounds": {str(k): n for k, n in tries.items()}}
    return GeneratedDataset(train, validation, details)


def list_rounds(samples: int) -> Sequence[int]:
    """The samples of each round, of which the last has `samples`."""
    return (*(count for count in ROUNDS if count < samples), samples)


def add_solution(row: dict[str, Any], solution: str | None) -> dict[str, Any]:
    """A row with a solution, unless it has one or there is none."""
    return row if get_solution(row) or not solution else {**row, SOLUTION_KEY: solution}
