"""What an alignment trains on and is measured on, by the kind of data that its objective reads.

A kind of data is one function here, `(config, tokenizer) -> AlignData`, and one row in `READERS`. What is sampled in
training is a second function, in `rollouts`.
"""

from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase

from potstill.core.types import PLUS
from potstill.data.preference_tokens import GroupKind
from potstill.objectives.spec import TrainingData
from potstill.stages.align.align_data import AlignData
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.evaluation import PreferenceEvaluator
from potstill.stages.align.prompts import read_prompt_data
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.preference_dataset import prepare_preferences

Reader = Callable[[AlignConfig, PreTrainedTokenizerBase], AlignData]


def read_data(config: AlignConfig, tokenizer: PreTrainedTokenizerBase) -> AlignData:
    """The data of a run, as its objective reads it.

    Raises: DataError, NotFound, UsageError.
    """
    return READERS[config.loss.data](config, tokenizer)


def read_preferences(config: AlignConfig, tokenizer: PreTrainedTokenizerBase) -> AlignData:
    """Pairs of answers, or answers with labels; for `aligndistil` the chosen answers alone."""
    kind: GroupKind = "labels" if config.loss.data == "labels" else "preferences"
    kind = "chosen" if PLUS in config.loss.networks else kind
    prepared = prepare_preferences(DatasetConfig.from_training(config), tokenizer, data=kind, groups=config.documents)
    return AlignData(
        packs=prepared.packs,
        validation_packs=prepared.validation_packs,
        digest=prepared.digest,
        facts=prepared.facts,
        evaluator=PreferenceEvaluator(packs=prepared.validation_packs, count=prepared.validation_counts.groups),
    )


READERS: Mapping[TrainingData, Reader] = {
    "preferences": read_preferences,
    "labels": read_preferences,
    "prompts": read_prompt_data,
}
