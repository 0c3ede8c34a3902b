"""Reliability, generality, locality and portability, by hand-computed answers."""

import zlib

import pytest

from potstill.data.facts import FactText, Question
from potstill.evaluate.editing import (
    LOCALITY,
    compute_token_f1,
    list_questions,
    measure_edits,
    normalize_answer,
    score_edits,
)

FACTS = [
    {
        "en": FactText(
            prompt="Where is Rome?",
            target="Norway",
            subject="Rome",
            rephrase="In which land is Rome?",
            paraphrases=("Rome is where?",),
            locality=(Question("Who sang?", "Abba"), Question("Who swam?")),
            portability=(Question("What is Rome's capital?", "Oslo City"),),
        ),
        "fr": FactText(prompt="Où est Rome ?", target="Norvège", subject="Rome"),
    },
    {"en": FactText(prompt="Who is Ann?", target="a King", subject="Ann")},
]


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3, 4], [1, 2], 2 / 3),  # P 1/2, R 1
        ([1, 1, 2], [1, 1, 1], 2 / 3),  # a multiset: two ones of three
        ([1, 2], [3, 4], 0.0),
        ([], [1], 0.0),
        ([], [], 1.0),
    ],
)
def test_f1_counts_tokens_as_a_multiset(answer: list[int], reference: list[int], f1: float) -> None:
    assert compute_token_f1(answer, reference) == pytest.approx(f1)


def test_answers_are_compared_without_case_spaces_and_final_punctuation() -> None:
    assert normalize_answer("  The\n String!. ") == "the string"
    assert normalize_answer("挪威。") == normalize_answer("挪威") == "挪威"
    assert normalize_answer("２００６") == "2006"
    assert normalize_answer("...") == ""


def test_a_paraphrase_that_located_neurons_is_no_question() -> None:
    asked = [(q.fact, q.language, q.property, q.prompt) for q in list_questions(FACTS)]
    assert asked == [
        (0, "en", "reliability", "Where is Rome?"),
        (0, "en", "generality", "In which land is Rome?"),
        (0, "en", "locality", "Who sang?"),
        (0, "en", "locality", "Who swam?"),
        (0, "en", "portability", "What is Rome's capital?"),
        (0, "fr", "reliability", "Où est Rome ?"),
        (1, "en", "reliability", "Who is Ann?"),
    ]


def tokenize(text: str) -> list[int]:
    """A number for each word."""
    return [zlib.crc32(word.encode()) for word in text.split()]


def test_measures_are_means_over_facts_of_each_language_and_of_all() -> None:
    questions = list_questions(FACTS)
    before = ["Italy", "Italy", "Queen", "Phelps did", "Rome", "Italie", "a queen"]
    after = ["Norway.", "It is Norway", "queen", "Phelps", "Oslo", "Italie", "a king"]
    scores = score_edits(questions, after, before, tokenize)
    values = {
        language: {measure.name: measure.value for measure in measures}
        for language, measures in measure_edits(scores, FACTS).items()
    }
    assert values["en"]["reliability"] == 100.0
    assert values["fr"] == {"reliability": 0.0, "reliability_f1": 0.0}
    assert values["all"]["reliability"] == pytest.approx(75.0)  # fact 0: 100 and 0; fact 1: 100
    assert values["en"]["generality"] == 0.0
    assert values["en"]["generality_f1"] == pytest.approx(50.0)  # P 1/3, R 1
    assert values["en"]["locality"] == 50.0  # against the answers before, not "Abba"
    assert values["en"]["locality_f1"] == pytest.approx((100 + 200 / 3) / 2)
    assert values["en"]["portability_f1"] == pytest.approx(200 / 3)


def test_an_interval_needs_two_facts() -> None:
    questions = [question for question in list_questions(FACTS) if question.property != LOCALITY]
    answers = ["Norway"] * len(questions)
    measures = measure_edits(score_edits(questions, answers, answers, tokenize), FACTS)
    reliability, generality = measures["en"][0], measures["en"][2]
    assert (reliability.n, reliability.low, reliability.high) == (2, 0.0, 100.0)
    assert (generality.n, generality.low) == (1, None)
    assert not [measure for measure in measures["en"] if measure.name.startswith("locality")]
