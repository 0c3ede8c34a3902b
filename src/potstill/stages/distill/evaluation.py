"""A student measured beside its teacher on the same rows, before it is trained and afterwards."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from potstill.core.atomic_files import write_text
from potstill.core.types import NEXT_TOKEN_LOG_P, Measure, Needs, supervised_positions
from potstill.evaluate.agreement import collect_teacher_outputs, compare_with_teacher
from potstill.evaluate.measures import measure_quality, measure_size
from potstill.evaluate.perplexity import Scores, count_scored_bytes, count_scored_tokens, score, sum_by_row
from potstill.evaluate.scoring_windows import Row, ScoringConfig, build_packs
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.teachers.external import ExternalTeacher
from potstill.teachers.served import ServedTeacher

BEFORE_TRAINING = "before training"  # the name of that row in a card


def evaluate_student_and_teacher(
    student: LoadedModel,
    teacher: LoadedModel | ExternalTeacher,
    rows: Sequence[Row],
    reading: ScoringConfig,
    *,
    teacher_rows: Sequence[Row] = (),
) -> dict[str, list[Measure]]:
    """Quality and size of a student and its teacher; of a teacher that is not here, what there is.

    `apart` are the same documents as a teacher of another tokenizer reads them: the two then have bits per byte in
    common, and no KL.
    """
    if isinstance(teacher, ExternalTeacher):
        teacher_measures = measure_external_teacher(teacher, rows, reading)
        student_measures = [*measure_quality(score(student.model, rows, reading)), *measure_size(student)]
        return (
            {"teacher": teacher_measures, student.name: student_measures}
            if teacher_measures
            else {student.name: student_measures}
        )
    if teacher_rows:
        teacher_reading = replace(reading, vocabulary=count_token_ids(teacher.tokenizer))
        return {
            "teacher": [*measure_quality(score(teacher.model, teacher_rows, teacher_reading)), *measure_size(teacher)],
            student.name: [*measure_quality(score(student.model, rows, reading)), *measure_size(student)],
        }
    remembered = collect_teacher_outputs(teacher.model, rows, reading)
    models = {"teacher": teacher, student.name: student}
    return {
        name: [*measure_quality(compare_with_teacher(remembered, model.model)), *measure_size(model)]
        for name, model in models.items()
    }


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


def evaluate_baseline(
    file: Path,
    student: PreTrainedModel,
    teacher: LoadedModel | ExternalTeacher | None,
    rows: Sequence[Row],
    reading: ScoringConfig,
) -> list[Measure]:
    """Quality of the student that training begins with: the baseline of its card. Kept in `file` for a resumed run."""
    if file.is_file():
        return [Measure(**measure) for measure in json.loads(file.read_text(encoding="utf-8"))]
    if not isinstance(teacher, LoadedModel):
        measures = measure_quality(score(student, rows, reading))
    else:
        measures = measure_quality(compare_with_teacher(collect_teacher_outputs(teacher.model, rows, reading), student))
    write_text(file, json.dumps([measure.to_dict() for measure in measures]))
    return measures
