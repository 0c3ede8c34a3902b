"""The measured load of layers that tokens may skip, and where a model states it."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from potstill.core.blueprint import Layer
from potstill.core.depth import EXECUTED
from potstill.core.types import Batch, Needs, move_batch
from potstill.models.eval_mode import eval_mode
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.signals import compute_signals


@torch.no_grad()
def measure_loads(model: PotstillForCausalLM, batches: Iterable[Batch]) -> list[float]:
    """The share of the tokens of `batches` that runs through each gated layer, in the order of the layers."""
    shares = []
    with eval_mode(model):
        for batch in batches:
            device_batch = move_batch(batch, model.device)
            needs = Needs(device_batch["documents"] >= 0, extras=frozenset({EXECUTED}))
            shares.append(compute_signals(model, device_batch, needs).extras[EXECUTED])
    return torch.cat(shares).mean(0).tolist()


def record_loads(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Measures the loads of a model with depth gates, and states them in its blueprint, whose costs count them.

    Any other model stays as it is, and its batches are not read.
    """
    if not isinstance(model, PotstillForCausalLM) or EXECUTED not in model.backbone.blueprint.reports():
        return
    loads = iter(measure_loads(model, batches))

    def set_load(layer: Layer) -> Layer:
        return layer if layer.depth is None else replace(layer, depth=replace(layer.depth, load=next(loads)))

    blueprint = model.backbone.blueprint.change_layers(lambda _: True, set_load)
    model.backbone.blueprint = blueprint
    model.config.blueprint = blueprint.to_dict()
