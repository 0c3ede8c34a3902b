"""Pairs for DPO from the model's own answers, by agreement with its answer in the pivot language (CM-Align).

For each question, the answers in the pivot language choose a pivot among themselves. In every other language, the
answer that agrees with it most is preferred to the one that agrees least (`evaluate.consistency.prefer`).

Source: CM-Align (arXiv:2509.08541), whose code was not available; `evaluate.consistency` says what is ours.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from potstill.core.errors import DataError
from potstill.evaluate.consistency import Embed, PreferredPair, prefer
from potstill.evaluate.embeddings import embed_texts
from potstill.models.load import LoadedModel
from potstill.stages.candidates.options import FIRST, CandidateOptions
from potstill.stages.candidates.questions import (
    Question,
    QuestionSet,
    check_columns,
    find_pivot_questions,
    group_by_key,
)
from potstill.stages.candidates.sampler import Candidate, CandidateSampler
from potstill.stages.candidates.selection import NO_SAMPLES
from potstill.stages.dataset_parts import GeneratedDataset
from potstill.train.rewards.accuracy import ANSWER_KEY, Accuracy
from potstill.train.rewards.base import Completion
from potstill.train.rewards.language import LANGUAGE_KEY

NO_AGREEMENT = "answers that tie, or that cannot be compared"
Row = dict[str, Any]


def select_preferences(options: CandidateOptions, sampler: CandidateSampler, data: QuestionSet) -> GeneratedDataset:
    """The pairs of the trained and of the held-out questions.

    Raises: DataError for a row without a language, or where no pair results.
    """
    check_columns(data.all, (LANGUAGE_KEY,), reader="--select prefer")
    embed = make_embed(sampler.loaded)
    left_out: Counter[str] = Counter()
    parts = (data.train, data.validation)
    train, validation = (select_pairs(options, sampler, part, embed, left_out) for part in parts)
    if not train:
        raise DataError(
            f"no pair of answers results from {len(data.train)} prompts: {dict(+left_out)}; raise --samples or "
            f"--max-tokens, or choose another --consistency"
        )
    languages = Counter(str(row[LANGUAGE_KEY]) for row in train)
    details = {"pairs": len(train), "languages": dict(languages), "left_out": dict(+left_out), **count_right(train)}
    return GeneratedDataset([drop_facts(row) for row in train], [drop_facts(row) for row in validation], details)


def make_embed(loaded: LoadedModel) -> Embed:
    """The embeddings of texts by the model itself."""
    return partial(embed_texts, loaded.model, loaded.tokenizer)


def select_pairs(
    options: CandidateOptions,
    sampler: CandidateSampler,
    questions: Sequence[Question],
    embed: Embed,
    left_out: Counter[str],
) -> list[Row]:
    """The pairs of some questions. Adds to `left_out` the questions without one, by reason."""
    pivots = find_pivot_questions(questions, options.pivot)
    versions = [
        question
        for key, group in group_by_key(questions).items()
        for question in group
        if key in pivots and (question.language != options.pivot or options.pivot_pairs)
    ]
    num_without_pivot = sum(question.key not in pivots for question in questions)
    left_out[f"a prompt without a version in {options.pivot}"] += num_without_pivot
    version_keys = {question.key for question in versions}
    pivot_questions = [question for key, question in pivots.items() if key in version_keys]
    pivot_samples = sampler.draw(pivot_questions, options.samples)
    pivot_candidates = {q.key: candidates for q, candidates in zip(pivot_questions, pivot_samples, strict=True)}
    rows = []
    for question, candidates in zip(versions, sampler.draw(versions, options.samples), strict=True):
        pair = choose_pair(options, pivot_candidates[question.key], candidates, embed)
        if isinstance(pair, str):
            left_out[pair] += 1
        else:
            rows.append(make_row(question, pair))
    return rows


def choose_pair(
    options: CandidateOptions, pivots: Sequence[Candidate], candidates: Sequence[Candidate], embed: Embed
) -> PreferredPair | str:
    """The pair of a question, or the reason why there is none. An answer that was cut or is empty takes no part."""
    pivot_texts, texts = (select_texts(group) for group in (pivots, candidates))
    if not pivot_texts or not texts:
        return NO_SAMPLES
    if options.pivot_answer == FIRST:
        pivot_texts = pivot_texts[:1]
    return prefer(pivot_texts, texts, kind=options.consistency, embed=embed) or NO_AGREEMENT


def select_texts(candidates: Sequence[Candidate]) -> list[str]:
    """The texts of candidates that ended and are not empty."""
    return [candidate.text for candidate in candidates if candidate.ended and candidate.text.strip()]


def make_row(question: Question, pair: PreferredPair) -> Row:
    """A preference with explicit prompt, and the row's own columns."""
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in pair)
    return {**question.row, "prompt": list(question.messages), "chosen": chosen, "rejected": rejected}


def drop_facts(row: Mapping[str, Any]) -> Row:
    """A preference without other columns of its row, some of which would make its format ambiguous."""
    names = ("prompt", "chosen", "rejected", "tools", "id", LANGUAGE_KEY)
    return {name: row[name] for name in names if row.get(name) is not None}


def count_right(rows: Sequence[Row]) -> dict[str, Any]:
    """How many pairs have a right chosen and a wrong rejected answer, where rows have an `answer`."""
    rows_with_answer = [row for row in rows if row.get(ANSWER_KEY) not in (None, "")]
    if not rows_with_answer:
        return {}
    accuracy = Accuracy()
    chosen, rejected = (
        accuracy([Completion("", row[side][0]["content"], row, ended=True) for row in rows_with_answer])
        for side in ("chosen", "rejected")
    )
    right = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    return {"checked_pairs": len(rows_with_answer), "right_pairs": right}
