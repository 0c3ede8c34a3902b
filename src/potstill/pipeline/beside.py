"""A student measured beside its teacher on the same rows, before it is trained and afterwards."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from potstill.core.artefact import write_text
from potstill.core.types import Measure
from potstill.evaluate.agreement import collect_teacher_outputs, compare_with_teacher
from potstill.evaluate.measure import measure_quality, measure_size
from potstill.evaluate.perplexity import score
from potstill.evaluate.reading import Row, ScoringConfig
from potstill.models.load import LoadedModel
from potstill.models.vocabulary import count_token_ids
from potstill.pipeline.absent import ExternalTeacher

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
        teacher_measures = teacher.compute_measures(rows, reading)
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
