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

from potstill.core.blueprint import Blueprint, weight_shapes
from potstill.core.errors import UnsupportedModel
from potstill.core.parts import Shapes
from potstill.core.types import Weights
from potstill.layers.ffn.experts import Experts
from potstill.models.backbone import Backbone
from potstill.models.families.gemma import GEMMA3
from potstill.models.families.llama import (
    EMBED,
    HEAD,
    LLAMA,
    MISTRAL,
    Family,
)
from potstill.models.families.mixtral import MIXTRAL
from potstill.models.families.qwen import QWEN2, QWEN3
from potstill.models.families.qwen3_5 import QWEN3_5
from potstill.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from potstill.models.hf_causal_lm import PotstillConfig, PotstillForCausalLM

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, GEMMA3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, QWEN3_5)
}


def read_blueprint(config: PreTrainedConfig) -> Blueprint:
    """The blueprint of a config of potstill's own, or of a stock family.

    Raises:
        UnsupportedModel: its family is not in `FAMILIES`, or it uses an option that a blueprint does not have.
    """
    if isinstance(config, PotstillConfig):
        return config.to_blueprint()
    if config.model_type not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise UnsupportedModel(f"{config.model_type!r} models cannot be imported; the supported families are {names}")
    return FAMILIES[config.model_type].to_blueprint(config)


def find_family(blueprint: Blueprint) -> Family | None:
    """The family that expresses `blueprint` exactly, preferably the one of the original model; None if none does."""
    origin_family = FAMILIES.get(blueprint.get_extra("family", ""))
    candidates = [*([origin_family] if origin_family else []), *FAMILIES.values()]
    return next((family for family in candidates if family.can_express(blueprint)), None)


def has_experts(model_type: str) -> bool:
    """Whether the models of a stock family have experts, which GGUF files of potstill do not."""
    return model_type in FAMILIES and Experts in FAMILIES[model_type].kinds


def make_config(blueprint: Blueprint) -> PreTrainedConfig:
    """The config of a stock family that expresses the blueprint, or potstill's own."""
    family = find_family(blueprint)
    return PotstillConfig.from_blueprint(blueprint) if family is None else family.to_config(blueprint)


def name_weights(blueprint: Blueprint, weights: Weights) -> dict[str, Tensor]:
    """The weights under the names of the model that `make_model` makes."""
    family = find_family(blueprint)
    if family is None:
        return {f"model.backbone.{name}": weight for name, weight in weights.items()}
    return family.export_weights(weights)


def list_parameter_shapes(blueprint: Blueprint) -> Shapes:
    """Name and shape of each parameter of the model that `make_model` makes of a blueprint."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in weight_shapes(blueprint).items()}
    state = name_weights(blueprint, weights)
    if blueprint.tied:
        state.pop(HEAD, None)
    return {name: tuple(weight.shape) for name, weight in state.items()}


def make_model(blueprint: Blueprint, *, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a stock family that expresses the blueprint, or a `PotstillForCausalLM`; its weights are not set."""
    with no_init_weights():  # saves time, and leaves the caller's random generator as it is
        model: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(blueprint), dtype=dtype)
    return model


def read_weights(model: PreTrainedModel) -> tuple[Blueprint, Weights]:
    """The blueprint of a model and its weights by our names. They are the model's own tensors, with their gradients;
    those of stacked experts are views.

    Raises:
        UnsupportedModel: the family is unknown, or the config ties the head but its weights differ from the
        embedding's.
    """
    if isinstance(model, PotstillForCausalLM):
        return model.backbone.blueprint, cast(Weights, model.backbone.state_dict(keep_vars=True))
    blueprint, state = read_blueprint(model.config), model.state_dict(keep_vars=True)
    if blueprint.tied and state[HEAD] is not state[EMBED] and not torch.equal(state[HEAD], state[EMBED]):
        raise UnsupportedModel("the config ties head and embedding, but their weights differ")
    return blueprint, FAMILIES[model.config.model_type].import_weights(state, tied=blueprint.tied)


def import_model(model: PreTrainedModel) -> Backbone:
    """The same function as a `Backbone`, with copies of the weights, their dtype and their device.

    Raises:
        UnsupportedModel: as `read_weights` does.
    """
    blueprint, weights = read_weights(model)
    with torch.device("meta"):
        backbone = Backbone(blueprint)
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    backbone.load_state_dict(copies, strict=True, assign=True)
    return backbone.train(model.training)


def export_model(backbone: Backbone, origin: PreTrainedModel | None = None) -> PreTrainedModel:
    """The same function as a model of a stock family, or as a `PotstillForCausalLM` where no family expresses it.

    The weights are copies. The generation config (stop tokens, sampling) comes from `origin`; no blueprint holds it.
    """
    weights = {name: weight.detach().clone() for name, weight in backbone.state_dict().items()}
    model = make_model(backbone.blueprint, dtype=backbone.embed.weight.dtype)
    model.load_state_dict(name_weights(backbone.blueprint, weights), strict=True, assign=True)
    model.tie_weights()
    if origin is not None:
        model.generation_config = copy.deepcopy(origin.generation_config)
    return model.to(backbone.embed.weight.device).train(backbone.training)
