"""Measures a student and its teacher on the same rows, before and after training."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from potstill.core.elastic import format_share
from potstill.core.measure import Measure
from potstill.core.types import NEXT_TOKEN_LOG_P, Needs, supervised_positions
from potstill.evaluate.agreement import collect_teacher_outputs, compare_with_teacher
from potstill.evaluate.measures import TextScores, measure_quality, measure_size
from potstill.evaluate.perplexity import Scores, count_scored_bytes, count_scored_tokens, score, sum_by_row
from potstill.evaluate.scoring_windows import Row, ScoringConfig, build_packs
from potstill.evaluate.teacher_reference import count_comparable_ids
from potstill.models.elastic import get_sizes, slice_model
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.teachers.external import ExternalTeacher
from potstill.teachers.served import ServedTeacher


def evaluate_student_and_teacher(
    student: LoadedModel,
    teacher: LoadedModel | ExternalTeacher,
    rows: Sequence[Row],
    reading: ScoringConfig,
    *,
    teacher_rows: Sequence[Row] = (),
) -> dict[str, list[Measure]]:
    """Quality and size of a student and its teacher; of a teacher that is not here, what there is.

    `teacher_rows` are the same documents as a teacher of another tokenizer or chat template reads them. Each model then
    has the bits per byte of its own. KL needs one tokenizer, and is measured in the student's template.
    """
    if isinstance(teacher, ExternalTeacher):
        teacher_measures = measure_external_teacher(teacher, rows, reading)
        student_measures = [*measure_quality(score(student.model, rows, reading)), *measure_size(student)]
        return (
            {"teacher": teacher_measures, student.name: student_measures}
            if teacher_measures
            else {student.name: student_measures}
        )
    if teacher_rows and count_comparable_ids(teacher, student) is None:
        teacher_scores: TextScores = score_teacher(teacher, teacher_rows, reading)
        student_scores: TextScores = score(student.model, rows, reading)
    else:
        outputs = collect_teacher_outputs(teacher.model, rows, reading)
        comparisons = [compare_with_teacher(outputs, model) for model in (teacher.model, student.model)]
        if teacher_rows:
            note = f"in the chat template of {student.name}"
            comparisons = [replace(comparison, note=note) for comparison in comparisons]
            comparisons[0] = replace(comparisons[0], scores=score_teacher(teacher, teacher_rows, reading))
        teacher_scores, student_scores = comparisons
    return {
        "teacher": [*measure_quality(teacher_scores), *measure_size(teacher)],
        student.name: [*measure_quality(student_scores), *measure_size(student)],
    }


def evaluate_sizes(
    student: LoadedModel, teacher: LoadedModel | ExternalTeacher, rows: Sequence[Row], reading: ScoringConfig
) -> dict[str, list[Measure]]:
    """Quality and parameters of the smaller sizes of an elastic student, by `NAME#SHARE`; empty for any other."""
    sizes = get_sizes(student.model)[1:]
    outputs, measures = None, {}
    if sizes and isinstance(teacher, LoadedModel) and count_comparable_ids(teacher, student) is not None:
        outputs = collect_teacher_outputs(teacher.model, rows, reading)
    for size in sizes:
        view = slice_model(student.model, size.share)
        scores = score(view, rows, reading) if outputs is None else compare_with_teacher(outputs, view)
        name = f"{student.name}#{format_share(size.share)}"
        measures[name] = [*measure_quality(scores), *measure_size(replace(student, model=view, name=name))]
    return measures


def score_teacher(teacher: LoadedModel, rows: Sequence[Row], reading: ScoringConfig) -> Scores:
    """The scores of a teacher on the rows that its own tokenizer and chat template give."""
    return score(teacher.model, rows, replace(reading, vocabulary=count_token_ids(teacher.tokenizer)))


def measure_external_teacher(teacher: ExternalTeacher, rows: Sequence[Row], reading: ScoringConfig) -> list[Measure]:
    """Quality of a served teacher by its own log-probabilities; nothing for a cache, which holds no held-out text."""
    if not isinstance(teacher.signal_source, ServedTeacher):
        return []
    nll = np.zeros(len(rows))
    for batch, owners in build_packs(rows, reading):
        positions, _, segment = supervised_positions(batch)
        with torch.no_grad():
            logprobs = teacher.signal_source.signals(batch, Needs(positions)).scores[NEXT_TOKEN_LOG_P]
        nll += sum_by_row(owners[segment], -logprobs, len(rows))
    return measure_quality(Scores(nll, count_scored_tokens(rows), count_scored_bytes(rows)))


def measure_student(
    student: PreTrainedModel,
    teacher: LoadedModel | ExternalTeacher | None,
    rows: Sequence[Row],
    reading: ScoringConfig,
) -> list[Measure]:
    """Quality of a student, with KL to its teacher and agreement with it where the teacher's weights are here."""
    if not isinstance(teacher, LoadedModel):
        return measure_quality(score(student, rows, reading))
    return measure_quality(compare_with_teacher(collect_teacher_outputs(teacher.model, rows, reading), student))
