"""Measures the bytes of activations that autograd saves for a backward, on a few layers of a network."""

import functools
from collections import Counter
from dataclasses import replace
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint
from potstill.core.types import Needs, supervised_positions
from potstill.data.packing import collate
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model
from potstill.models.signals import compute_signals
from potstill.train.lora import add_adapters

PROBE_TOKENS = (64, 128)  # tokens of the two passes whose difference gives the bytes per token


class AutogradBytes(NamedTuple):
    """Bytes that autograd keeps for the backward: per token and layer, and the rest per token and per layer.

    Where layers are of several kinds, they are means over the layers.
    """

    per_token_layer: float
    per_token: float
    per_layer: float


def measure_autograd_bytes(
    blueprint: Blueprint, *, dtype: torch.dtype, lora: int = 0, stock: bool = True
) -> AutogradBytes:
    """The bytes that autograd saves of a student, measured on one and two layers of each kind, at full width.

    They are linear in tokens and in layers, so four passes of some tokens, with a short vocabulary, are enough. It
    measures each kind of layer separately and once; a layer's bytes are the mean over all. `stock` measures the network
    that trains, else potstill's `Backbone`, in which pruning measures. It measures layers without their depth gates, so
    that all tokens run, as in the first step after a conversion.
    """
    blueprint = blueprint.change_layers(lambda _: True, lambda layer: replace(layer, depth=None))
    counts = Counter(blueprint.layers)
    kinds = [replace(blueprint, layers=(layer,), vocabulary=PROBE_TOKENS[0]) for layer in counts]
    measured = [_measure_layer_bytes(kind, dtype=dtype, lora=lora, stock=stock) for kind in kinds]
    shares = [count / len(blueprint.layers) for count in counts.values()]
    return AutogradBytes(*(sum(map(mul, values, shares)) for values in zip(*measured, strict=True)))


@functools.cache
@torch.random.fork_rng(devices=[])
def _measure_layer_bytes(blueprint: Blueprint, *, dtype: torch.dtype, lora: int, stock: bool) -> AutogradBytes:
    """The bytes that autograd saves of a student whose layers are all like the only one of `blueprint`."""
    device = torch.device("cpu")

    def count_bytes(layers: int, tokens: int) -> float:
        small = replace(blueprint, layers=blueprint.layers * layers)
        backbone = Backbone(small).to(device)
        model: Any = export_model(backbone) if stock else backbone
        model = add_adapters(model, lora) if lora else model
        return _count_saved_bytes(model.train(), tokens, dtype)

    (a, b), (c, d) = ([count_bytes(layers, tokens) for tokens in PROBE_TOKENS] for layers in (1, 2))
    token_difference = PROBE_TOKENS[1] - PROBE_TOKENS[0]
    two_layer_slope, one_layer_slope = (d - c) / token_difference, (b - a) / token_difference
    return AutogradBytes(
        two_layer_slope - one_layer_slope,
        2 * one_layer_slope - two_layer_slope,
        (c - PROBE_TOKENS[0] * two_layer_slope) - (a - PROBE_TOKENS[0] * one_layer_slope),
    )


def _count_saved_bytes(model: Any, tokens: int, dtype: torch.dtype) -> float:
    """Bytes of the distinct storages that a forward saves for its backward, without the model's own weights."""
    ids = torch.arange(tokens) % PROBE_TOKENS[0]
    batch = collate([{"input_ids": ids, "labels": ids, "lengths": torch.tensor([tokens])}])
    weight_pointers = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive until counted, so that no address is used twice

    def save_tensor(tensor: Tensor) -> Tensor:
        # The graph holds this hook and its result. If either held a tensor with a graph, it would never be freed.
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        return tensor.detach()

    enabled = dtype != torch.float32
    with (
        torch.autograd.graph.saved_tensors_hooks(save_tensor, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=enabled),
    ):
        if isinstance(model, Backbone):
            _ = model(batch["input_ids"], batch["position_ids"])
        else:
            _ = compute_signals(model, batch, Needs(supervised_positions(batch)[0]))
    return float(
        sum(tensor_storage.nbytes() for pointer, tensor_storage in storages.items() if pointer not in weight_pointers)
    )
