"""A student measured beside its teacher on the same rows, before it is trained and afterwards."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from potstill.core.artefact import write_text
from potstill.core.types import Measure
from potstill.evaluate.agreement import compare, remember
from potstill.evaluate.measure import quality, sizes
from potstill.evaluate.perplexity import score
from potstill.evaluate.reading import Reading, Row
from potstill.models.load import Loaded
from potstill.models.vocabulary import real_ids
from potstill.pipeline.absent import Absent

BEFORE = "before training"  # the name of that row in a card


def beside_teacher(
    made: Loaded,
    teacher: Loaded | Absent,
    rows: Sequence[Row],
    reading: Reading,
    *,
    apart: Sequence[Row] = (),
) -> dict[str, list[Measure]]:
    """Quality and size of a student and its teacher; of a teacher that is not here, what there is.

    `apart` are the same documents as a teacher of another tokenizer reads them: the two then have bits per byte in
    common, and no KL.
    """
    if isinstance(teacher, Absent):
        found = teacher.measures(rows, reading)
        alone = [*quality(score(made.model, rows, reading)), *sizes(made)]
        return {"teacher": found, made.name: alone} if found else {made.name: alone}
    if apart:
        own = replace(reading, vocabulary=real_ids(teacher.tokenizer))
        return {
            "teacher": [*quality(score(teacher.model, apart, own)), *sizes(teacher)],
            made.name: [*quality(score(made.model, rows, reading)), *sizes(made)],
        }
    remembered = remember(teacher.model, rows, reading)
    models = {"teacher": teacher, made.name: made}
    return {name: [*quality(compare(remembered, one.model)), *sizes(one)] for name, one in models.items()}


def before_training(
    file: Path, student: PreTrainedModel, teacher: Loaded | Absent | None, rows: Sequence[Row], reading: Reading
) -> list[Measure]:
    """Quality of the student that training begins with: the baseline of its card. Kept in `file` for a resumed run."""
    if file.is_file():
        return [Measure(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    if not isinstance(teacher, Loaded):
        found = quality(score(student, rows, reading))
    else:
        found = quality(compare(remember(teacher.model, rows, reading), student))
    write_text(file, json.dumps([one.to_dict() for one in found]))
    return found
