"""Prompts that a model solves now and then: 0 < right samples < all (M-Thinker's selection for GRPO).

A group of samples that are all right or all wrong has no advantages, so its prompt teaches nothing. Where a number of
prompts for each language is given, the highest `tier` of the data is sampled first. Languages that lack prompts are
topped up from the tier below, and so on.

Source: M-Thinker (arXiv:2510.07300) and its released code. Departs from the code: there, a language that still lacks
prompts gets some that were right in another language, and some that were never right. Those are flat groups here.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from potstill.core.errors import DataError
from potstill.stages.candidates.options import CandidateOptions
from potstill.stages.candidates.questions import Question, QuestionSet, check_columns, find_pivot_questions
from potstill.stages.candidates.sampler import CandidateSampler
from potstill.stages.candidates.selection import NO_SAMPLES, find_right
from potstill.stages.console import print_note
from potstill.stages.dataset_parts import PROMPTS_PER_PART, GeneratedDataset, cut_parts
from potstill.train.rewards.thinking import ENGLISH_KEY
from potstill.train.rewards.weighted import RewardSum

TIER_KEY = "tier"
RIGHT_KEY, SAMPLES_KEY = "right", "samples"  # the columns that are added
NEVER, ALWAYS = "never right", "always right"
EXCLUDED, UNUSED = "excluded", "not needed for its language"


def select_mixed(
    options: CandidateOptions,
    sampler: CandidateSampler,
    data: QuestionSet,
    reward: RewardSum,
    excluded: Collection[str] = (),
) -> GeneratedDataset:
    """The prompts with some right samples, and the held-out prompts as they are.

    A question with an `excluded` key is left out, in all its versions.

    Raises: DataError for a row without a column that the reward reads, or where no prompt is left.
    """
    check_columns(data.all, reward.columns, reader=f"--reward {options.reward}")
    used_keys = {question.key for question in data.all if not question.keys.isdisjoint(excluded)}
    questions = [question for question in data.train if question.key not in used_keys]
    if excluded and not used_keys:
        print_note(
            "--exclude holds none of the prompts that are sampled, neither by id nor by text, so none is left out"
        )
    left_out: Counter[str] = Counter({EXCLUDED: len(data.train) - len(questions)})
    pivots = find_pivot_questions(data.all, options.pivot)
    rows: list[dict[str, Any]] = []
    languages: Counter[str] = Counter()
    num_sampled = 0
    for part in schedule(questions, languages, options.per_language):
        num_sampled += len(part)
        for question, candidates in zip(part, sampler.draw(part, options.samples), strict=True):
            num_right = sum(find_right(reward, question, candidates))
            reason = explain_flatness(num_right, len(candidates))
            if reason or is_full(languages[question.language], options.per_language):
                left_out[reason or UNUSED] += 1
                continue
            languages[question.language] += 1
            counts = {RIGHT_KEY: num_right, SAMPLES_KEY: len(candidates)}
            rows.append({**question.row, **counts, **get_english(question, pivots)})
    left_out[UNUSED] += len(questions) - num_sampled
    if not rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items() if count)
        raise DataError(
            f"no prompt of {data.name} is solved by some of {options.samples} samples and missed by others "
            f"({reasons}); raise --samples, or give easier or harder --data"
        )
    details = {
        "prompts": len(rows),
        "languages": {k: n for k, n in languages.items() if k},
        "left_out": dict(+left_out),
    }
    validation = [{**question.row, **get_english(question, pivots)} for question in data.validation]
    return GeneratedDataset(rows, validation, details)


def explain_flatness(num_right: int, num_samples: int) -> str:
    """Why a prompt teaches nothing; empty where some samples are right and some are not."""
    if not num_samples:
        return NO_SAMPLES
    return NEVER if num_right == 0 else ALWAYS if num_right == num_samples else ""


def is_full(count: int, per_language: int) -> bool:
    """Whether a language has the prompts that it needs."""
    return 0 < per_language <= count


def schedule(
    questions: Sequence[Question], counts: Mapping[str, int], per_language: int
) -> Iterator[Sequence[Question]]:
    """The questions in the parts in which they are sampled; once a language has `per_language`, its rest is skipped.

    `counts` are those of the languages, and grow between the parts. Without `per_language` tiers change nothing.

    Raises: DataError for a tier that is no number.
    """
    tiers = sorted({read_tier(question) for question in questions}, reverse=True) if per_language else [0.0]
    for tier in tiers:
        rest = [question for question in questions if not per_language or read_tier(question) == tier]
        for part in cut_parts(rest, PROMPTS_PER_PART):
            needed = [question for question in part if not is_full(counts.get(question.language, 0), per_language)]
            if needed:
                yield needed


def read_tier(question: Question) -> float:
    """The tier of a question; 0 without one.

    Raises: DataError for a tier that is no number.
    """
    value = question.row.get(TIER_KEY) or 0
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the row of {question.text[:60]!r} has the tier {value!r}; give numbers, the hardest the highest"
        ) from error


def get_english(question: Question, pivots: Mapping[str, Question]) -> dict[str, str]:
    """The column with a question's version in English, where there is one."""
    version = pivots.get(question.key)
    is_new = version is not None and version.language == "en" and not question.row.get(ENGLISH_KEY)
    return {ENGLISH_KEY: version.text} if version is not None and is_new else {}
