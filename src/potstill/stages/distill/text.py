"""The templates of all tokenizers of a distillation, with one date."""

from collections.abc import Mapping
from pathlib import Path

from potstill.core.atomic_files import TRAINING_FOLDER
from potstill.core.errors import CacheMismatch
from potstill.stages.distill.config import DistillConfig
from potstill.stages.model_pair import ModelPair
from potstill.stages.options import TextOptions
from potstill.stages.run_record import RunRecord
from potstill.stages.text_options import DATE_ORIGIN, prepare_tokenizer
from potstill.teachers.cached import TeacherCache
from potstill.train import distributed


def prepare_text(
    config: DistillConfig, pair: ModelPair, caches: Mapping[str, TeacherCache], *, resume_folder: Path | None = None
) -> dict[str, str]:
    """Give the student's tokenizer the template of --chat-template, and fix the date that all templates write.

    The date is that of the run that is resumed, or of the cache. Returns it for the card; nothing if none is written.

    Raises: NotFound, UsageError; CacheMismatch for caches of two dates.
    """
    record = None if resume_folder is None else RunRecord.from_folder(resume_folder / TRAINING_FOLDER)
    dates = {cache.manifest.facts.date for cache in caches.values()} - {""}
    if len(dates) > 1:
        raise CacheMismatch(
            f"the chat template writes the date, and the caches were made with {' and '.join(sorted(dates))}; make "
            f"them on one day"
        )
    origins = record.origins if record is not None else {DATE_ORIGIN: next(iter(dates), None)}
    origins = distributed.broadcast_from_main(origins)
    facts = prepare_tokenizer(pair.origin.tokenizer, config, origins=origins)
    for teacher in pair.loaded_teachers.values():
        if teacher.tokenizer is not pair.origin.tokenizer:
            facts |= prepare_tokenizer(teacher.tokenizer, TextOptions(), origins=facts or origins)
    return facts
