"""Ternary weights: every matrix of a layer keeps its trained numbers, and multiplies by their signs (arXiv:2402.17764).

The trained numbers become the latent ones that training moves; the forward rounds them (`ops/ternary.py`). The result
is far from the original until it is trained: the relative error of a rounded Gaussian matrix is 0.51, and the card has
that of the model's own matrices. Distillation from the original heals it. Embedding and head are not rounded.

With `norm=true` each matrix gets an RMSNorm on its input, as in MatMul-free LM. The gain c of the norm starts from the
mean root mean square r of that input over calibration text. This c gives the least squared error of c x / r from x. The
relative error is then the standard deviation of r over the root mean square of r.
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
from potstill.layers.linear.ternary import Ternary, TernaryLinear
from potstill.models.backbone import Backbone
from potstill.models.eval_mode import eval_mode
from potstill.models.hooks import temporary_hooks
from potstill.ops.ternary import quantize_weight
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.conversion import Conversion, parse_layers, register_conversion


@register_conversion("ternary", help="weights in {-1, 0, 1} times one number a matrix, activations in 8 bits (BitNet)")
@dataclass(frozen=True, kw_only=True)
class ToTernary(Conversion):
    """Makes the linear maps of the layers ternary."""

    layers: str | None = Option[str | None](None, "Layers such as 0-3-5; by default all.").field()
    activations: bool = Option(True, "Round the inputs of each matrix to 8 bits for each token.").field()
    norm: bool = Option(False, "Normalize the input of each matrix, as MatMul-free LM does.").field()

    @property
    def reads_text(self) -> bool:  # type: ignore[override]
        """Norms start from what they measure on text."""
        return self.norm

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same layers with ternary maps.

        Raises:
            UsageError: a layer is ternary already, or there is no such layer.
        """
        layers = parse_layers(self.layers, len(old.layers))
        if converted := [i for i in layers if old.layers[i].linear != DENSE]:
            kind = old.layers[converted[0]].linear.kind_name
            raise UsageError(f"layer {converted[0]} has {kind} matrices already; name others with ternary:layers=")
        return old.change_layers(layers.__contains__, lambda layer: self._convert_layer(layer, old))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The same weights, and norms that multiply by 1."""
        shapes = weight_shapes(self.blueprint(old)).items()
        like = weights["norm.weight"]
        return dict(weights) | {name: like.new_ones(shape) for name, shape in shapes if name not in weights}

    def convert(self, model: Backbone, batches: Sequence[Batch]) -> tuple[Backbone, dict[str, Any]]:
        """The ternary model, with the relative error of its rounded matrices and of its normalized inputs."""
        converted = apply_transform(self, model)
        layers = [i for i, layer in enumerate(converted.blueprint.layers) if layer != model.blueprint.layers[i]]
        maps = {
            f"layers.{i}.{name}": linear_map
            for i in layers
            for name, linear_map in converted.layers[i].named_modules()
            if isinstance(linear_map, TernaryLinear)
        }
        facts: dict[str, Any] = {"weight_error": measure_weight_error(maps.values())}
        if self.norm:
            sizes = measure_input_sizes(model, maps, batches)
            with torch.no_grad():
                for name, size in sizes.items():
                    maps[name].get_parameter("norm.weight").fill_(size.mean())
            errors = [(size.var(unbiased=False) / size.square().mean()).sqrt() for size in sizes.values()]
            facts["input_error"] = float(torch.stack(errors).square().mean().sqrt()) if errors else 0.0
        return converted, facts

    def _convert_layer(self, layer: Layer, old: Blueprint) -> Layer:
        return replace(layer, linear=Ternary(self.activations, self.norm, old.norm_eps))


@torch.no_grad()
def measure_weight_error(maps: Iterable[TernaryLinear]) -> float:
    """The root of the squared distance of the matrices from their rounded form, over their squared size."""
    error, size = 0.0, 0.0
    for linear_map in maps:
        weight = linear_map.weight.float()
        error += float((weight - quantize_weight(weight).dequantize()).square().sum())
        size += float(weight.square().sum())
    return math.sqrt(error / size) if size else 0.0


@torch.no_grad()
def measure_input_sizes(model: Backbone, names: Iterable[str], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The root mean square of the input of each named map, for each token that it reads in the batches."""
    sizes: dict[str, list[Tensor]] = {name: [] for name in names}

    def make_hook(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            sizes[name].append(inputs[0].float().square().mean(-1).sqrt().flatten())

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(make_hook(name)) for name in names]
    with temporary_hooks(handles), eval_mode(model):
        for batch in batches:
            model(batch["input_ids"], batch["position_ids"])
    return {name: torch.cat(values) for name, values in sizes.items() if values}
