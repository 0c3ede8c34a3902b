"""The model that an alignment trains, and its tokenizer."""

from collections.abc import Mapping
from pathlib import Path

from potstill.core.atomic_files import TRAINING_FOLDER
from potstill.core.errors import UsageError
from potstill.evaluate.scoring_windows import check_context
from potstill.models.causality import require_causal
from potstill.models.elastic import get_sizes
from potstill.models.load import LoadedModel
from potstill.models.quantization import check_trainable
from potstill.stages.align.config import AlignConfig
from potstill.stages.run_models import load_run_model
from potstill.stages.run_record import RunRecord
from potstill.stages.text_options import DATE_ORIGIN, prepare_tokenizer
from potstill.teachers.cached import CacheFolder
from potstill.train import distributed


def load_policy(config: AlignConfig) -> LoadedModel:
    """The model to train, in float32.

    Raises: NotFound; UnsupportedModel for a quantized model, or one that sees the token that it is to predict;
        UsageError for several sizes or a short context.
    """
    check_trainable(config.model, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code)
    policy = load_run_model(config, config.model)
    require_causal(policy.model, f"the model {policy.name}")
    check_context(config.settings.context, policy.model)
    if get_sizes(policy.model):
        raise UsageError(f"{policy.name} is elastic, and align trains one size; give it as {policy.name}#0.5")
    return policy


def prepare_text(
    config: AlignConfig, policy: LoadedModel, caches: Mapping[str, CacheFolder], *, resume_folder: Path | None = None
) -> dict[str, str]:
    """Give the tokenizer the template of --chat-template, and fix the date that it writes, for the card.

    The date is that of the run that is resumed, or of a cache.

    Raises: UsageError, NotFound.
    """
    record = None if resume_folder is None else RunRecord.from_folder(resume_folder / TRAINING_FOLDER)
    dates = (cache.manifest.facts.date for cache in caches.values() if cache.manifest.facts.date)
    origins = {DATE_ORIGIN: next(dates, None)} if record is None else record.origins
    return prepare_tokenizer(policy.tokenizer, config, origins=distributed.broadcast_from_main(origins))
