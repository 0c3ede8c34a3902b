"""The frozen networks of an alignment: the reference, and the two models that `aligndistil` learns from.

The reference computes in the policy's own precision: float32 weights under the same autocast. A copy in bfloat16 would
round otherwise, and the log-ratio of two equal models would not be 0. There are four kinds:

    the model before training     a frozen copy (by default)
    --lora                        the model with its adapters off, without a second copy
    --reference MODEL             another model, of the same tokenizer and chat template
    --reference-cache CACHE       log-probabilities that `potstill cache --own` wrote, 4 bytes a row
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from potstill.core.device import resolve_device
from potstill.core.errors import VocabularyMismatch
from potstill.core.types import MINUS, PLUS, REFERENCE, SignalSource
from potstill.evaluate.scoring_windows import check_context
from potstill.models.causality import require_causal
from potstill.models.frozen_copy import copy_frozen
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_shared_ids
from potstill.stages.align.caches import build_source
from potstill.stages.align.config import AlignConfig
from potstill.stages.run_models import load_run_model
from potstill.teachers.cached import CacheFolder
from potstill.train.frozen_view import FrozenView

Network: TypeAlias = PreTrainedModel | SignalSource


def load_frozen_models(
    config: AlignConfig, policy: LoadedModel, *, skip: Collection[str] = ()
) -> dict[str, LoadedModel]:
    """The models of `--reference`, `--plus` and `--minus` by the name of their network, without those in caches.

    Raises: VocabularyMismatch for another tokenizer or chat template than that of the policy; NotFound;
        UnsupportedModel for a model that sees the token that it is to predict; UsageError for a shorter context.
    """
    names = {REFERENCE: config.reference, PLUS: config.plus, MINUS: config.minus}
    models = {}
    for network, name in names.items():
        if name is None or network in skip:
            continue
        models[network] = load_run_model(config, name)
        check_same_text(models[network], policy, network=network, has_template=config.chat_template is not None)
        require_causal(models[network].model, f"the {network} model {name}")
        check_context(config.settings.context, models[network].model)
    return models


def check_same_text(frozen: LoadedModel, policy: LoadedModel, *, network: str, has_template: bool) -> None:
    """Refuse a frozen model that reads other tokens than the policy; `has_template`: both get one template.

    Raises: VocabularyMismatch.
    """
    try:
        count_shared_ids(frozen.tokenizer, policy.tokenizer)
    except VocabularyMismatch as error:
        raise VocabularyMismatch(
            f"the {network} model {frozen.name} has another tokenizer than {policy.name}, and both read one text; "
            f"give a model with the same tokenizer"
        ) from error
    if not has_template and frozen.tokenizer.chat_template != policy.tokenizer.chat_template:
        raise VocabularyMismatch(
            f"the {network} model {frozen.name} has another chat template than {policy.name}, and both read one text; "
            f"give a model with the same one, or one template for both with --chat-template"
        )


def build_networks(
    config: AlignConfig,
    policy: LoadedModel,
    student: Any,
    models: Mapping[str, LoadedModel],
    caches: Mapping[str, CacheFolder],
    *,
    dtype: torch.dtype,
) -> dict[str, Network]:
    """What gives the signals of each network that the objective needs; `student` is the policy as it is trained.

    Raises: NotFound, CacheMismatch, UnsupportedModel for a cache with hidden states whose model's head cannot be read.
    """
    networks: dict[str, Network] = {}
    for name in config.loss.networks:
        if name in caches:
            networks[name] = build_source(config, caches[name], dtype)
        elif name in models:
            models[name].move_to(resolve_device(config.device), torch.float32 if name == REFERENCE else dtype)
            networks[name] = models[name].model
        else:
            assert name == REFERENCE, f"the network {name!r} has no model"
            networks[name] = FrozenView(student, dtype) if config.lora else copy_frozen(policy.model, dtype)
    return networks
