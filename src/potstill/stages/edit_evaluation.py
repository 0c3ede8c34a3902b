"""Answers the questions about edited facts, and measures them by language before and after the edits."""

from collections.abc import Sequence

from potstill.core.counts import count_noun
from potstill.core.measure import Measure
from potstill.core.screen import status
from potstill.data.facts import Fact
from potstill.evaluate.editing import LOCALITY, answer_questions, list_questions, measure_edits, score_edits
from potstill.stages.fact_editor import FactEditor

BEFORE = "before, "  # in the card: the measures of the model as it was


def answer_facts(editor: FactEditor, facts: Sequence[Fact]) -> list[str]:
    """The greedy answers to all questions about facts, by the model with the edits that it has."""
    loaded, questions = editor.loaded, list_questions(facts)
    with status(f"answering {count_noun(len(questions), 'question')}"):
        return answer_questions(
            loaded.model, loaded.tokenizer, questions, editor.encode, max_tokens=editor.options.max_tokens
        )


def measure_answers(
    editor: FactEditor, facts: Sequence[Fact], answers: Sequence[str], answers_before: Sequence[str]
) -> dict[str, list[Measure]]:
    """The measures of each language, and those before the edits, which have no locality."""
    questions = list_questions(facts)
    scores = score_edits(questions, answers, answers_before, editor.tokenize)
    scores_before = score_edits(questions, answers_before, answers_before, editor.tokenize)
    measures_before = measure_edits([s for s in scores_before if s.question.property != LOCALITY], facts)
    return {
        **measure_edits(scores, facts),
        **{f"{BEFORE}{language}": measures for language, measures in measures_before.items()},
    }
