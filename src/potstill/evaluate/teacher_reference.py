"""A teacher that several students are compared with: it reads the documents once, by its own chat template.

Bits per byte and perplexity of a student are measured by the student's own template. KL and agreement need the same
tokens for both models, so the student then reads the documents as the teacher's template writes them, and the note of
the measure says so.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from potstill.core.errors import VocabularyMismatch
from potstill.core.types import IGNORE
from potstill.evaluate.agreement import TeacherComparison, TeacherOutputs, collect_teacher_outputs, compare_with_teacher
from potstill.evaluate.perplexity import Scores, score
from potstill.evaluate.scoring_windows import Row, ScoringConfig
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_token_ids

log = logging.getLogger("potstill")


class TeacherReference:
    """`teacher`, with the `rows` that it reads. `config.vocabulary` is ignored: it follows from the tokenizers.

    `has_template` says whether a chat template wrote the rows.
    """

    def __init__(self, teacher: LoadedModel, rows: Sequence[Row], config: ScoringConfig, *, has_template: bool) -> None:
        self.teacher, self.rows, self.config = teacher, list(rows), config
        self.origin = f"in the chat template of {teacher.name}" if has_template else ""
        self._outputs: dict[int, TeacherOutputs] = {}

    def compare(self, loaded: LoadedModel, rows: Sequence[Row]) -> Scores | TeacherComparison:
        """The scores of a model on its own `rows`, and the comparison with the teacher where their tokenizers allow it.

        Documents with ids that the two do not share are left out of the comparison, which its note counts.
        """
        config = replace(self.config, vocabulary=count_token_ids(loaded.tokenizer))
        vocabulary = count_comparable_ids(self.teacher, loaded)
        if vocabulary is None:
            return score(loaded.model, rows, config)
        shared_rows = select_shared_rows(self.rows, vocabulary)
        if not any(label != IGNORE for row in shared_rows for label in row.labels[1:]):
            log.warning(
                "note: %s has no KL to %s: every document holds ids that it lacks", loaded.name, self.teacher.name
            )
            return score(loaded.model, rows, config)
        if vocabulary not in self._outputs:
            teacher_config = replace(self.config, vocabulary=vocabulary)
            self._outputs[vocabulary] = collect_teacher_outputs(self.teacher.model, shared_rows, teacher_config)
        comparison = compare_with_teacher(self._outputs[vocabulary], loaded.model)
        num_left_out = len(self.rows) - len(shared_rows)
        left_out = f"{num_left_out} documents left out, with ids that it lacks" if num_left_out else ""
        note = "; ".join(part for part in (self.origin, left_out) if part)
        is_same_text = shared_rows == list(rows) and vocabulary == config.vocabulary
        scores = comparison.scores if is_same_text else score(loaded.model, rows, config)
        return replace(comparison, scores=scores, note=note)


def select_shared_rows(rows: Sequence[Row], vocabulary: int) -> list[Row]:
    """The rows whose ids are all below `vocabulary`."""
    return [row for row in rows if max(row.input_ids, default=0) < vocabulary]


def count_comparable_ids(teacher: LoadedModel, loaded: LoadedModel) -> int | None:
    """The number of ids that both share; None if their tokenizers differ, so that KL between them is undefined."""
    try:
        return count_shared_ids(teacher.tokenizer, loaded.tokenizer)
    except VocabularyMismatch:
        return None
