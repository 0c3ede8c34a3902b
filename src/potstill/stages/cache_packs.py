"""The text that `cache` reads, in packs."""

import sys
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.data.mixture import load_mixture
from potstill.data.packing import Packs, join_packs
from potstill.data.preference_schema import recognize_any
from potstill.data.preference_tokens import GroupKind
from potstill.stages import text_options
from potstill.stages.corpus import load_data
from potstill.stages.dataset import check_has_end, pack_corpus
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.options import CacheTeacherOptions
from potstill.stages.preference_dataset import prepare_preferences
from potstill.stages.reading_report import build_corpus_facts


def load_packs(config: CacheTeacherOptions, tokenizer: PreTrainedTokenizerBase) -> tuple[Packs, dict[str, Any]]:
    """The windows of a data set in packs (all of them, or as many as hold `tokens`), and its facts for the card.

    Preferences are packed as `align` packs them, the held-out ones included.

    Raises: UsageError for a streamed corpus without `tokens`, and for --own on other data than preferences.
    """
    corpus = load_data(config, load=partial(load_mixture, recognize=recognize_any))
    if corpus.kind == "preferences":
        return load_preference_packs(config, tokenizer, has_labels=next(iter(corpus.documents))["label"] is not None)
    if config.own:
        raise UsageError(
            f"--own stores the log-probabilities of preferences, and {corpus.name} holds {corpus.kind}; omit it, or "
            f"give rows of prompt, chosen and rejected"
        )
    check_has_end(corpus, config.tokens)
    packs, report = pack_corpus(
        corpus,
        tokenizer,
        length=config.context,
        seed=config.seed,
        tokens=config.tokens,
        rendering=text_options.make_rendering(config),
    )
    return packs, build_corpus_facts(corpus, packs, report)


def load_preference_packs(
    config: CacheTeacherOptions, tokenizer: PreTrainedTokenizerBase, *, has_labels: bool
) -> tuple[Packs, dict[str, Any]]:
    """All preferences in packs, those to train on and then the held-out ones, and the facts for the card.

    Raises: UsageError for `tokens`.
    """
    if config.tokens is not None:
        raise UsageError("--tokens limits text, and preferences are cached whole; omit it")
    dataset_config = DatasetConfig(
        **text_options.get_text_options(config),
        data=config.data,
        columns=config.columns,
        context=config.context,
        seed=config.seed,
    )
    data: GroupKind = "labels" if has_labels else "preferences"
    prepared = prepare_preferences(dataset_config, tokenizer, data=data, groups=sys.maxsize)
    return join_packs(prepared.packs, prepared.validation_packs), dict(prepared.facts)
