"""The templates of all tokenizers of a distillation, with one date."""

from collections.abc import Mapping
from pathlib import Path

from potstill.stages.distill.config import DistillConfig
from potstill.stages.model_pair import ModelPair
from potstill.stages.options import TextOptions
from potstill.stages.run_models import read_text_origins
from potstill.stages.text_options import prepare_tokenizer
from potstill.teachers.cached import TeacherCache


def prepare_text(
    config: DistillConfig, pair: ModelPair, caches: Mapping[str, TeacherCache], *, resume_folder: Path | None = None
) -> dict[str, str]:
    """Give the student's tokenizer the template of --chat-template, and fix the date that all templates write.

    The date is that of the run that is resumed, or of the cache. Returns it for the card; nothing if none is written.

    Raises: NotFound, UsageError; CacheMismatch for caches of two dates.
    """
    origins = read_text_origins(caches, resume_folder=resume_folder)
    facts = prepare_tokenizer(pair.origin.tokenizer, config, origins=origins)
    for teacher in pair.loaded_teachers.values():
        if teacher.tokenizer is not pair.origin.tokenizer:
            facts |= prepare_tokenizer(teacher.tokenizer, TextOptions(), origins=facts or origins)
    return facts
