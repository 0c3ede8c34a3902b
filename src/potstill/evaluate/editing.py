"""How well facts are edited: reliability, generality, locality and portability of greedy answers, by language.

- Reliability: the answer to the edited question is the target.
- Generality: so is the answer to the same question in other words.
- Locality: the answer to an unrelated question is the one *before* the edit, right or wrong.
- Portability: the answer to a question that follows from the fact is its own answer.

Each is an exact match and a token F1, times 100. Source: Wang et al., "Cross-Lingual Knowledge Editing in Large
Language Models" (arXiv:2309.08952). Its code divides by zero where answer and reference share no token; here F1 is 0.
Its tokens are those of Llama; here they are those of the model. Both texts are normalized first: NFKC, lower case,
single spaces, and no punctuation at the end.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.measure import Measure
from potstill.data.facts import Fact, list_languages
from potstill.decode.generate import GenerationOptions, generate_texts
from potstill.evaluate.bootstrap import measure_ratio

RELIABILITY, GENERALITY, LOCALITY, PORTABILITY = PROPERTIES = ("reliability", "generality", "locality", "portability")
ALL_LANGUAGES = "all"
F1_SUFFIX = "_f1"


class EditQuestion(NamedTuple):
    """A question about the fact with this index; `reference` is empty for locality, whose reference is an answer."""

    fact: int
    language: str
    property: str
    prompt: str
    reference: str


class EditScore(NamedTuple):
    """The scores of one answer, from 0 to 100."""

    question: EditQuestion
    exact_match: float
    f1: float


def list_questions(facts: Sequence[Fact]) -> list[EditQuestion]:
    """All questions that test the edits of facts."""
    questions = []
    for index, fact in enumerate(facts):
        for language, text in fact.items():
            rows = [(RELIABILITY, text.prompt, text.target)]
            rows += [(GENERALITY, text.rephrase, text.target)] if text.rephrase else []
            rows += [(LOCALITY, question.prompt, "") for question in text.locality]
            rows += [(PORTABILITY, question.prompt, question.answer) for question in text.portability]
            questions += [EditQuestion(index, language, *row) for row in rows]
    return questions


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[EditQuestion],
    encode: Callable[[str], Sequence[int]],
    *,
    max_tokens: int,
) -> list[str]:
    """The greedy answers of the model, with its edits; `encode` gives the token ids of a prompt."""
    options = GenerationOptions(max_new_tokens=max_tokens)
    return generate_texts(model, tokenizer, [encode(question.prompt) for question in questions], options=options)


def score_edits(
    questions: Sequence[EditQuestion],
    answers: Sequence[str],
    answers_before: Sequence[str],
    tokenize: Callable[[str], Sequence[int]],
) -> list[EditScore]:
    """The score of each answer; `answers_before` are those of the model without the edit."""
    scores = []
    for question, answer, answer_before in zip(questions, answers, answers_before, strict=True):
        reference = answer_before if question.property == LOCALITY else question.reference
        pair = normalize_answer(answer), normalize_answer(reference)
        f1 = compute_token_f1(*map(tokenize, pair))
        scores.append(EditScore(question, 100.0 * (pair[0] == pair[1]), 100.0 * f1))
    return scores


def measure_edits(scores: Sequence[EditScore], facts: Sequence[Fact]) -> dict[str, list[Measure]]:
    """The measures of each language and of all, with 95 % bootstrap intervals over facts.

    A fact with several questions of one kind counts their mean.
    """
    measures = {}
    for language in (ALL_LANGUAGES, *list_languages(facts)):
        selected = [score for score in scores if language in (ALL_LANGUAGES, score.question.language)]
        measures[language] = [measure for name in PROPERTIES for measure in _measure_property(name, selected)]
    return measures


def _measure_property(name: str, scores: Sequence[EditScore]) -> list[Measure]:
    """The exact match and the F1 of one property; none without a question."""
    by_fact: dict[int, list[EditScore]] = {}
    for score in scores:
        if score.question.property == name:
            by_fact.setdefault(score.question.fact, []).append(score)
    if not by_fact:
        return []
    columns: Mapping[str, list[float]] = {
        name: [float(np.mean([s.exact_match for s in group])) for group in by_fact.values()],
        name + F1_SUFFIX: [float(np.mean([s.f1 for s in group])) for group in by_fact.values()],
    }
    return [measure_ratio(measure_name, np.array(values)) for measure_name, values in columns.items()]


def normalize_answer(text: str) -> str:
    """NFKC, lower case, single spaces, and no punctuation or space at the end."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    while words and (words[-1].isspace() or unicodedata.category(words[-1]).startswith("P")):
        words = words[:-1]
    return words


def compute_token_f1(answer: Sequence[int], reference: Sequence[int]) -> float:
    """2 P R / (P + R) of the multisets of tokens, in [0, 1]: 0 where they share none, 1 for two empty texts."""
    if not answer and not reference:
        return 1.0
    overlap = sum((Counter(answer) & Counter(reference)).values())
    return 2 * overlap / (len(answer) + len(reference))
