"""The alignment of a completion's thinking with a known solution: a judge's score, or results that both share.

Source: the cross-lingual thinking alignment (CTA) of M-Thinker (arXiv:2510.07300).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.data.answers import find_numbers
from potstill.data.thinking import split_thinking
from potstill.train.rewards.base import Completion, Judge, register_reward

SOLUTION_KEY, ENGLISH_KEY = "solution", "english"
MAX_TRIES = 3  # of a judge, in the released code
SCORE = re.compile(r"<score>\s*(?P<numerator>\d*\.?\d+)\s*(?:/\s*(?P<denominator>\d*\.?\d+))?\s*</score>")
PROMPT = """You compare how two people solve one problem.

Problem:
{problem}

Thinking in English, which is correct:
{solution}

Thinking in another language:
{thinking}

List the key intermediate results of the English thinking. Count how many of them the other thinking reaches too. \
Answer with nothing but that count divided by the number of all key results, a number from 0 to 1, as \
<score>NUMBER</score>."""


@register_reward("thinking", help="the share of the solution's results that the thinking reaches")
@dataclass(frozen=True)
class Thinking:
    """How far a completion's thinking follows the `solution` of its row, from 0 to 1; 0 for a row without one.

    A `judge` is a language model that gets the English problem (`english` of the row, else the prompt), the solution
    and the thinking, and replies with a score. A reply without a score from 0 to 1 is asked for again, three times in
    all, and then counts as 0. Without a judge the score is the share of the solution's numbers that the thinking has.

    Departs from the released code: the wording of the question to the judge is ours, after the paper's description.
    """

    judge: Judge | None = None

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """A number from 0 to 1 for each completion."""
        texts = [get_thinking(completion.completion) for completion in completions]
        if self.judge is None:
            return [compare_results(c.row, c.prompt, text) for c, text in zip(completions, texts, strict=True)]
        return self._ask_judge(self.judge, completions, texts)

    def _ask_judge(self, judge: Judge, completions: Sequence[Completion], texts: Sequence[str]) -> list[float]:
        prompts = {
            n: PROMPT.format(problem=get_problem(c), solution=get_solution(c.row), thinking=text)
            for n, (c, text) in enumerate(zip(completions, texts, strict=True))
            if get_solution(c.row)
        }
        scores = [0.0] * len(completions)
        for _ in range(MAX_TRIES):
            if not prompts:
                break
            replies = judge(list(prompts.values()))
            results = {n: parse_score(reply) for n, reply in zip(prompts, replies, strict=True)}
            for n, score in results.items():
                if score is not None:
                    scores[n] = score
                    del prompts[n]
        return scores


def get_thinking(text: str) -> str:
    """The thinking of a completion, or all of one without `</think>`."""
    parts = split_thinking(text)
    return text if parts is None else parts.thinking


def get_solution(row: Mapping[str, Any]) -> str:
    """The solution of a row; empty without one."""
    return str(row.get(SOLUTION_KEY) or "").strip()


def get_problem(completion: Completion) -> str:
    """The English problem of a row, else the prompt."""
    return str(completion.row.get(ENGLISH_KEY) or completion.prompt)


def parse_score(reply: str) -> float | None:
    """The number from 0 to 1 in the last `<score>` of a reply, which may be a fraction such as 3/4; None without."""
    matches = list(SCORE.finditer(reply))
    if not matches:
        return None
    denominator = float(matches[-1]["denominator"] or 1)
    score = float(matches[-1]["numerator"]) / denominator if denominator else -1.0
    return score if 0 <= score <= 1 else None


def compare_results(row: Mapping[str, Any], prompt: str, thinking: str) -> float:
    """The share of a solution's distinct numbers that the thinking has, without those that the prompt gives.

    0 for a row without a solution, or a solution without numbers of its own.
    """
    results = {number.value for number in find_numbers(get_solution(row))}
    results -= {number.value for number in find_numbers(prompt)}
    common = results & {number.value for number in find_numbers(thinking)}
    return len(common) / len(results) if results else 0.0
