"""A model with some of its layers, which shares all weights with the original: the draft of self-speculation."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.models.backbone import Backbone
from potstill.models.hf_config import PotstillConfig
from potstill.models.signals import copy_probe


def count_layers(model: PreTrainedModel) -> int:
    """The number of layers.

    Raises: UnsupportedModel if the model has no list of layers.
    """
    return len(find_layers(model)[1])


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """The model with only these layers, counted from 0, in a cache of their own. It shares weights and mode.

    Raises: UsageError for a layer that does not exist, or without any; UnsupportedModel without a list of layers.
    """
    path, all_layers = find_layers(model)
    if not layers:
        raise UsageError(f"all {len(all_layers)} layers would be skipped; leave at least one")
    if max(layers) >= len(all_layers):
        raise UsageError(f"layer {max(layers)} does not exist; the model's layers are 0 to {len(all_layers) - 1}")
    view_layers = nn.ModuleList(_renumber(all_layers[layer], index) for index, layer in enumerate(layers))
    view: PreTrainedModel = _replace(model, path.split("."), view_layers, _select_config(model.config, layers))
    copy_probe(model, view)
    return view


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and module of the list with the most weights; lists of experts are inside of it."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of layers, so none can be skipped")
    return max(lists, key=lambda item: sum(weight.numel() for weight in item[1].parameters()))


def _select_config(config: Any, layers: Sequence[int]) -> Any:
    """The config of the model with these layers."""
    if isinstance(config, PotstillConfig):
        blueprint = config.to_blueprint()
        return PotstillConfig.from_blueprint(replace(blueprint, layers=tuple(blueprint.layers[n] for n in layers)))
    config = copy.deepcopy(config)
    text_config = config.get_text_config()
    layer_types = getattr(text_config, "layer_types", None)
    text_config.num_hidden_layers = len(layers)
    if layer_types is not None:
        text_config.layer_types = [layer_types[n] for n in layers]
    return config


def _renumber(module: nn.Module, index: int) -> nn.Module:
    """A shallow copy whose parts find their keys and values at `index` of the cache."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {
        name: None if child is None else _renumber(child, index) for name, child in module._modules.items()
    }
    if hasattr(view, "layer_idx"):
        view.__dict__["layer_idx"] = index
    return view


def _replace(module: Any, path: Sequence[str], layers: nn.ModuleList, config: Any) -> Any:
    """A shallow copy of `module` with other layers at `path`, and their config."""
    view = copy.copy(module)
    name, *rest = path
    child = _replace(module._modules[name], rest, layers, config) if rest else layers
    view.__dict__["_modules"] = {**module._modules, name: child}
    if isinstance(view, Backbone):
        view.blueprint = config.to_blueprint()
    elif hasattr(view, "config"):
        view.config = config if isinstance(config, type(module.config)) else config.get_text_config()
    return view
