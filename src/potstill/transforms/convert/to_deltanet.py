"""Attention to DeltaNet or Gated DeltaNet, from its trained matrices: the start of a hybrid with linear layers.

Queries, keys, values and outputs start from those of the attention; keys and values that several query heads share are
repeated for each. Convolutions start as the identity, and beta as 1/2. The decays of the heads spread evenly, on a
logarithmic scale, from 0.1 % to 10 % a token. Rotary positions, norms of queries and keys, and biases are left out.

The function changes, so the new mixers are then matched to the old ones on calibration text, layer by layer
(`mixer_matching.py`): output gates are fitted to 1 and output matrices to the old outputs, by least squares, and all
weights are trained for `passes` passes. Distillation from the original heals the rest.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import UsageError
from potstill.core.options import Option
from potstill.core.parts import DENSE
from potstill.core.types import Batch, Weights
from potstill.layers.mixers.attention import Attention
from potstill.layers.mixers.delta_net import DeltaNet, DeltaNetMixer, invert_softplus
from potstill.models.backbone import Backbone
from potstill.models.eval_mode import eval_mode
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.conversion import Conversion, parse_layers, register_conversion, repeat_shared_heads
from potstill.transforms.convert.mixer_matching import (
    LeastSquares,
    fit_outputs,
    measure_errors,
    read_mixers,
    split_rows,
    train_mixers,
)

INITIAL_STD = 0.02  # of the output gates, before they are fitted
SEED = 1
UNIT_GATE = 1.2784645  # silu(x) = 1
SLOWEST, FASTEST = 1e-3, 0.1  # decay a token of the first and the last head


@register_conversion("deltanet", help="attention to DeltaNet, a memory of fixed size, in all layers or most of them")
@dataclass(frozen=True, kw_only=True)
class ToDeltaNet(Conversion):
    """Replaces attention by the (gated) delta rule, with as many heads of the same width."""

    reads_text = True

    gated: bool = Option(True, "Gated DeltaNet, which also decays its memory; else DeltaNet.").field()
    attention_every: int = Option(4, "Every so many layers the last one keeps its attention; 0: none does.").field()
    layers: str | None = Option[str | None](None, "The layers to convert, such as 0-3-5, instead.").field()
    passes: int = Option(
        4, "Passes over the calibration text, in which new mixers learn the outputs of the old."
    ).field()
    learning_rate: float = Option(1e-3, "Learning rate of these passes.").field()

    def __post_init__(self) -> None:
        if self.attention_every < 0 or self.attention_every == 1:
            raise UsageError(
                f"deltanet: attention_every is {self.attention_every}, which converts no layer; choose 0, 2 or more"
            )
        if self.passes < 0:
            raise UsageError(f"deltanet: passes is {self.passes}; choose 0 or more")
        if self.learning_rate <= 0:
            raise UsageError(f"deltanet: learning_rate is {self.learning_rate:g}; choose a number above 0")

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same layers with other mixers.

        Raises:
            UsageError: a layer has no attention or no plain matrices, there is no such layer, or none is left.
        """
        layers = self._list_layers(old)
        for i in layers:
            _check_layer(i, old.layers[i])
        return old.change_layers(layers.__contains__, lambda layer: replace(layer, mixer=self._make_mixer(layer)))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """Queries, keys, values and outputs of the attention, and all else as the file's docstring says."""
        generator = torch.Generator().manual_seed(SEED)
        return {
            name: weights[name] if _is_kept(name, shape, weights) else _start(name, shape, weights, old, generator)
            for name, shape in weight_shapes(self.blueprint(old)).items()
        }

    def convert(self, model: Backbone, batches: Sequence[Batch]) -> tuple[Backbone, dict[str, Any]]:
        """The converted model, and the relative error of each new mixer: at first, after the fit, after training."""
        converted, layers = apply_transform(self, model), self._list_layers(model.blueprint)
        mixers: dict[int, Any] = {i: converted.layers[i].mixer for i in layers}
        rows, measured_rows = split_rows(batches)
        with eval_mode(model):
            stages = {"start": measure_errors(model, mixers, measured_rows)}
            if self.gated:
                _fit_gates(model, mixers, rows)
            fit_outputs(model, mixers, rows)
            stages["fit"] = measure_errors(model, mixers, measured_rows)
            train_mixers(model, mixers, rows * self.passes, learning_rate=self.learning_rate)
            stages["training"] = measure_errors(model, mixers, measured_rows)
        errors = {str(i): {stage: values[i] for stage, values in stages.items()} for i in layers}
        tokens = sum(row["input_ids"].numel() for row in measured_rows)
        return converted, {"matching": {"measured_tokens": tokens, "relative_errors": errors}}

    def _list_layers(self, old: Blueprint) -> tuple[int, ...]:
        if self.layers is not None:
            return parse_layers(self.layers, len(old.layers))
        if any(isinstance(layer.mixer, DeltaNet) for layer in old.layers):
            raise UsageError("the model has DeltaNet layers already; name further ones with deltanet:layers=")
        every = self.attention_every
        layers = tuple(i for i in range(len(old.layers)) if not every or (i + 1) % every)
        if not layers:
            raise UsageError(f"deltanet: attention_every={every} converts none of the {len(old.layers)} layers")
        return layers

    def _make_mixer(self, layer: Layer) -> DeltaNet:
        mixer = layer.mixer
        assert isinstance(mixer, Attention)
        return DeltaNet(mixer.heads, mixer.heads, mixer.head_dim, mixer.head_dim, gated=self.gated)


def _check_layer(i: int, layer: Layer) -> None:
    if isinstance(layer.mixer, DeltaNet):
        raise UsageError(f"layer {i} is DeltaNet already; name other layers with deltanet:layers=")
    if not isinstance(layer.mixer, Attention):
        raise UsageError(f"layer {i} has {layer.mixer.kind_name} and no attention; name others with deltanet:layers=")
    if layer.linear != DENSE:
        raise UsageError(f"layer {i} has {layer.linear.kind_name} matrices; convert to deltanet first, and then those")


def _is_kept(name: str, shape: tuple[int, ...], weights: Weights) -> bool:
    return name in weights and tuple(weights[name].shape) == shape


def _start(name: str, shape: tuple[int, ...], weights: Weights, old: Blueprint, generator: torch.Generator) -> Tensor:
    """The first value of a weight that the old model has not, or has for fewer heads."""
    part, like = name.split(".", 2)[2].removeprefix("mixer."), weights["norm.weight"]
    if part in ("k.weight", "v.weight"):
        mixer = old.layers[int(name.split(".")[1])].mixer
        assert isinstance(mixer, Attention)
        return repeat_shared_heads(weights[name], mixer)
    value = torch.zeros(shape)
    if part == "gate.weight":
        value.normal_(0.0, INITIAL_STD, generator=generator)
    elif part.endswith("_conv.weight"):
        value[:, -1] = 1.0
    elif part == "norm.weight":
        value.fill_(1.0)
    elif part == "dt_bias":
        value = invert_softplus(torch.logspace(math.log10(SLOWEST), math.log10(FASTEST), *shape))
    return value.to(like)


@torch.no_grad()
def _fit_gates(model: Backbone, mixers: dict[int, DeltaNetMixer], rows: Iterable[Batch]) -> None:
    """Sets each output gate to the linear map of the inputs that is nearest to a factor of 1, in place."""
    sums = {i: LeastSquares() for i in mixers}
    for row in rows:
        for i, call in read_mixers(model, row, [*mixers]).items():
            x = call.x.flatten(0, 1)
            sums[i].add(x, torch.full_like(x[:, :1], UNIT_GATE))
    for i, least_squares in sums.items():
        gate = mixers[i].gate.get_parameter("weight")
        gate.copy_(least_squares.solve().mT.expand_as(gate))
    torch.clear_autocast_cache()  # it holds the weights in bf16
