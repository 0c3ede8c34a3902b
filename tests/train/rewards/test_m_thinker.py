"""M-Thinker's rewards: the published table, the gate, the judge, and what a solution's results count for."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.train.rewards.test_language import detect_words

from potstill.data.thinking import split_thinking
from potstill.train.rewards.base import Completion
from potstill.train.rewards.format import Format
from potstill.train.rewards.m_thinker import MThinker
from potstill.train.rewards.thinking import Thinking, parse_score

PROBLEM = "A box has 6 eggs. How many eggs have 7 boxes without 2 broken ones?"
SOLUTION = "7 boxes have 7 * 6 = 42 eggs. Without 2 broken ones there are 42 - 2 = 40."
THINKING = "donc on calcule 42 et puis 40 " + "et encore " * 120
ENGLISH_THINKING = "so we compute 42 and then 40 " + "and again " * 120
ROW = {"answer": "40", "language": "fr"}


def complete(text: str, **row: Any) -> Completion:
    return Completion(PROBLEM, text, {**ROW, **row}, ended=True)


def judge(prompts: Sequence[str]) -> list[str]:
    return ["I count 3 of 4: <score>0.75</score>"] * len(prompts)


TABLE = [  # completion, columns, reward
    (THINKING + "donc c'est \\boxed{40}", {}, -1.0),  # no </think>
    (THINKING + "</think>donc </think>\\boxed{40}", {}, -1.0),  # two of them
    ("donc 42, 40</think>\\boxed{40}", {}, -1.0),  # at most 1000 characters
    (ENGLISH_THINKING + "</think>donc c'est \\boxed{40}", {}, -1.0),  # English thinking, though right
    (THINKING + "</think>so it is clearly \\boxed{40}", {}, -1.0),  # an English answer
    (THINKING + "</think>donc c'est \\boxed{41}", {}, 0.0),  # consistent and wrong
    (THINKING + "</think>donc c'est \\boxed{40}", {}, 1.0),  # consistent and right, without a solution
    (THINKING + "</think>donc c'est \\boxed{40}", {"solution": SOLUTION}, 1.75),  # with a judge's 0.75
    (THINKING + "</think>donc c'est \\boxed{41}", {"solution": SOLUTION}, 0.0),  # a judge is not asked
]


@pytest.mark.parametrize("compat", ["clean", "official"])
@pytest.mark.parametrize(("text", "row", "value"), TABLE)
def test_the_reward_is_that_of_the_published_table(text: str, row: dict[str, Any], value: float, compat: str) -> None:
    reward = MThinker(detector=detect_words, judge=judge, compat=compat)
    assert reward([complete(text, **row)]) == [value]


def test_1000_characters_are_too_few_and_1001_are_enough() -> None:
    form = Format()
    text = "</think>".ljust(1000, "x")
    assert form([complete(text), complete(text + "x")]) == [0.0, 1.0]
    assert Format(minimum=3)([complete("a</think>b")]) == [1.0]


PARTS = st.sampled_from(["donc ", "so ", "42 ", "40 ", "</think>", "\\boxed{40}", "\\boxed{41}", "xxxxxxxxxxxxxxxx "])


@given(st.lists(PARTS, max_size=9).map("".join), st.sampled_from(["", SOLUTION]))
def test_no_reward_lies_between_0_and_1_or_outside_of_its_range(text: str, solution: str) -> None:
    reward = MThinker(detector=detect_words, minimum=5)
    (value,) = reward([complete(text, solution=solution)])
    assert value in (-1, 0) or 1 <= value <= 2
    terms = reward.score_terms([complete(text, solution=solution)]).terms
    assert value == sum(values[0] for values in terms.values())


def test_a_batch_is_scored_as_its_completions_are() -> None:
    reward = MThinker(detector=detect_words, judge=judge)
    completions = [complete(text, **row) for text, row, _ in TABLE]
    assert reward(completions) == [value for _, _, value in TABLE]
    assert reward([]) == []


def test_without_a_judge_the_solution_s_own_results_count() -> None:
    thinking = Thinking()
    texts = ["d'abord 42, enfin 40</think>40", "41, puis 40</think>", "6, 7 et 2</think>40", "42 et 40</think>"]
    assert thinking([complete(text, solution=SOLUTION) for text in texts]) == [1.0, 0.5, 0.0, 1.0]
    assert thinking([complete(texts[0]), complete(texts[0], solution="no numbers")]) == [0.0, 0.0]


def test_a_judge_reads_the_english_problem_the_solution_and_the_thinking() -> None:
    prompts: list[str] = []

    def read(batch: Sequence[str]) -> list[str]:
        prompts.extend(batch)
        return judge(batch)

    row = {"solution": SOLUTION, "english": "How many eggs?"}
    assert Thinking(read)([complete("<think>donc</think>40", **row), complete("x</think>")]) == [0.75, 0.0]
    assert len(prompts) == 1
    assert all(text in prompts[0] for text in ("How many eggs?", SOLUTION, "another language:\ndonc\n"))


def test_a_judge_without_a_score_is_asked_three_times_and_then_counts_as_0() -> None:
    calls = []

    def waver(prompts: Sequence[str]) -> list[str]:
        calls.append(len(prompts))
        return [f"<score>{len(calls) / 4}</score>" if len(calls) == 2 and n == 0 else "hm" for n in range(len(prompts))]

    completions = [complete("x</think>", solution=SOLUTION)] * 2
    assert Thinking(waver)(completions) == [0.5, 0.0]
    assert calls == [2, 2, 1]


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("<score>0.5</score>", 0.5),
        ("<score> 3/4 </score>", 0.75),
        ("<score>1</score> no, <score>0</score>", 0.0),
        ("<score>1.5</score>", None),
        ("<score>3/0</score>", None),
        ("0.5", None),
    ],
)
def test_a_score_is_read_from_the_last_tag(reply: str, score: float | None) -> None:
    assert parse_score(reply) == score


def test_thinking_ends_at_the_only_mark() -> None:
    assert split_thinking("<think>a</think>b") == ("a", "b")
    assert split_thinking("a") is split_thinking("a</think>b</think>") is None
