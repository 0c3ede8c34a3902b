"""A student measured beside its teacher on the same rows, before it is trained and afterwards."""

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from potstill.core.artefact import write_text
from potstill.core.types import Measure
from potstill.evaluate.agreement import compare, remember
from potstill.evaluate.measure import quality, sizes
from potstill.evaluate.reading import Reading, Row
from potstill.models.load import Loaded

BEFORE = "before training"  # the name of that row in a card


def beside_teacher(made: Loaded, teacher: Loaded, rows: Sequence[Row], reading: Reading) -> dict[str, list[Measure]]:
    """Quality and size of a student and its teacher."""
    remembered = remember(teacher.model, rows, reading)
    models = {"teacher": teacher, made.name: made}
    return {name: [*quality(compare(remembered, one.model)), *sizes(one)] for name, one in models.items()}


def before_training(
    file: Path, student: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Row], reading: Reading
) -> list[Measure]:
    """Quality of the student that training begins with: the baseline of its card. Kept in `file` for a resumed run."""
    if file.is_file():
        return [Measure(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    found = quality(compare(remember(teacher, rows, reading), student))
    write_text(file, json.dumps([one.to_dict() for one in found]))
    return found
