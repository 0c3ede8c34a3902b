"""Tensors that parts of a model report in a forward pass, such as the router's logits of experts.

potstill's models report by name (`Positions.report`). Stock models with experts give `router_logits`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from potstill.layers.ffn.experts import ROUTER_LOGITS
from potstill.models.hf_causal_lm import PotstillForCausalLM


def list_reports(model: PreTrainedModel) -> frozenset[str]:
    """The names of the reports that `model` can give."""
    if isinstance(model, PotstillForCausalLM):
        return model.backbone.blueprint.reports()
    has_router = hasattr(model.config.get_text_config(), "output_router_logits")
    return frozenset({ROUTER_LOGITS}) if has_router else frozenset()


def make_report_arguments(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Any]:
    """The arguments with which `model.base_model` gives the reports `names`."""
    names = sorted(names)
    if isinstance(model, PotstillForCausalLM):
        return {"output_reports": names} if names else {}
    return {"output_router_logits": True} if ROUTER_LOGITS in names else {}


def get_reports(output: Any, names: Iterable[str], positions: Bool[Tensor, "B T"]) -> dict[str, Tensor]:
    """The reports in `output` at `positions`, each `[N R ...]` of the R parts that give it."""
    return {name: _get_report(output, name, positions) for name in sorted(names)}


def _get_report(output: Any, name: str, positions: Bool[Tensor, "B T"]) -> Tensor:
    if getattr(output, "reports", None) is not None:
        report: Tensor = output.reports[name][positions]
        return report
    # stock routers give [B T, E] or [B, T, E] for each layer that has one
    layers = [layer.reshape(*positions.shape, -1)[positions] for layer in getattr(output, name)]
    return torch.stack(layers, 1)
