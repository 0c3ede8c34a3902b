"""The stock families that potstill reads and saves, by Hugging Face's `model_type`.

potstill exports a blueprint as a stock family if one expresses it exactly, and else as its own architecture.
"""

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from potstill.core.blueprint import Blueprint
from potstill.core.errors import UnsupportedModel
from potstill.core.types import Weights
from potstill.models.backbone import Backbone
from potstill.models.families.gemma import GEMMA3
from potstill.models.families.llama import (
    EMBED,
    HEAD,
    LLAMA,
    MISTRAL,
    Family,
    convert_weights_from_hf,
    convert_weights_to_hf,
)
from potstill.models.families.qwen import QWEN2, QWEN3
from potstill.models.hf_causal_lm import PotstillConfig, PotstillForCausalLM

FAMILIES: Mapping[str, Family] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA3)}


def read_blueprint(config: PreTrainedConfig) -> Blueprint:
    """The blueprint of a stock config.

    Raises:
        UnsupportedModel: its family is not in `FAMILIES`, or it uses an option that a blueprint does not have.
    """
    if config.model_type not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise UnsupportedModel(f"{config.model_type!r} models cannot be imported; the supported families are {names}")
    return FAMILIES[config.model_type].to_blueprint(config)


def find_family(blueprint: Blueprint) -> Family | None:
    """The family that expresses `blueprint` exactly, preferably the one of the original model; None if none does."""
    origin_family = FAMILIES.get(blueprint.get_extra("family", ""))
    candidates = [*([origin_family] if origin_family else []), *FAMILIES.values()]
    return next((family for family in candidates if family.can_express(blueprint)), None)


def export_weights(blueprint: Blueprint, weights: Weights) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """(stock config, stock state dict) of the same function.

    Raises:
        UnsupportedModel: no stock family expresses it.
    """
    family = find_family(blueprint)
    if family is None:
        raise UnsupportedModel("no stock family has layers like these; save it as PotstillForCausalLM")
    return family.to_config(blueprint), convert_weights_to_hf(weights, family.part_names)


def import_model(model: PreTrainedModel) -> Backbone:
    """The same function as a `Backbone`, with copies of the weights, their dtype and their device.

    Raises:
        UnsupportedModel: the family is unknown, or the config ties the head but its weights differ from the
        embedding's.
    """
    if isinstance(model, PotstillForCausalLM):
        blueprint, weights = model.backbone.blueprint, cast(Weights, model.backbone.state_dict())
    else:
        blueprint, state = read_blueprint(model.config), model.state_dict()
        if blueprint.tied and not torch.equal(state[HEAD], state[EMBED]):
            raise UnsupportedModel("the config ties head and embedding, but their weights differ")
        weights = convert_weights_from_hf(state, FAMILIES[model.config.model_type].part_names, tied=blueprint.tied)
    with torch.device("meta"):
        backbone = Backbone(blueprint)
    backbone.load_state_dict({name: weight.clone() for name, weight in weights.items()}, strict=True, assign=True)
    return backbone.train(model.training)


def export_model(backbone: Backbone, origin: PreTrainedModel | None = None) -> PreTrainedModel:
    """The same function as a model of a stock family, or as a `PotstillForCausalLM` where no family expresses it.

    The weights are copies. The generation config (stop tokens, sampling) comes from `origin`; no blueprint holds it.
    """
    blueprint, weights = backbone.blueprint, {k: v.detach().clone() for k, v in backbone.state_dict().items()}
    config: PreTrainedConfig
    if find_family(blueprint) is None:
        config, state = (
            PotstillConfig.from_blueprint(blueprint),
            {f"model.backbone.{name}": w for name, w in weights.items()},
        )
    else:
        config, state = export_weights(blueprint, weights)
    with no_init_weights():  # saves time, and leaves the caller's random generator as it is
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=backbone.embed.weight.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    if origin is not None:
        model.generation_config = copy.deepcopy(origin.generation_config)
    return model.to(backbone.embed.weight.device).train(backbone.training)
