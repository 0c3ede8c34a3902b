"""Mixture of depths: every second layer gets a gate, and tokens whose gate is closed skip the layer (MoDification).

All gates start alike: their weights are 0 and their bias is b, so g = sigmoid(b) and every token runs. With `open` the
gate divides g by sigmoid(b), so the model computes exactly what it did. Without it, the paper's form, each gated layer
adds sigmoid(b) of what it added. Training with the objective `load` then closes gates.
"""

import math
from dataclasses import dataclass, replace

import torch

from potstill.core.blueprint import Blueprint
from potstill.core.depth import Depth
from potstill.core.errors import UsageError
from potstill.core.options import Option
from potstill.core.types import Weights
from potstill.transforms.convert.conversion import Conversion, parse_layers, register_conversion


@register_conversion("depths", help="gates by which tokens skip layers: mixture of depths with a threshold")
@dataclass(frozen=True, kw_only=True)
class ToMixtureOfDepths(Conversion):
    """Gives layers a depth gate (`core.depth.Depth`) with the threshold and the bias; no other weight changes.

    Source: Zhang et al., MoDification (arXiv:2410.14268). Departs from the paper: `open`, and the bias, which the paper
    does not state.
    """

    layers: str | None = Option[str | None](
        None, "The gated layers, such as 1-3-5; every second one by default."
    ).field()
    threshold: float = Option(0.5, "The smallest gate with which a token runs through the layer.").field()
    bias: float = Option(1.0, "The logit of every gate at the start.").field()
    open: bool = Option(True, "Divide gates by their value at the start, so that the model stays as it is.").field()
    load: float = Option(1.0, "The share of tokens that will run, which plans count; training measures it.").field()

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise UsageError(f"depths: threshold is {self.threshold:g}; choose a number between 0 and 1")
        if not 0 <= self.load <= 1:
            raise UsageError(f"depths: load is {self.load:g}; choose a share from 0 to 1")
        start = 1 / (1 + math.exp(-self._start_logit))
        if start < self.threshold:
            raise UsageError(
                f"depths: gates of bias {self.bias:g} start at {start:.2g}, below the threshold {self.threshold:g}, so "
                f"no token would run; choose a larger bias"
            )

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same layers, some of them behind gates.

        Raises:
            UsageError: there is no such layer, only one layer, or a layer has a gate already.
        """
        if any(layer.depth is not None for layer in old.layers):
            raise UsageError("layers of this model have depth gates already; convert the original model")
        unit_logit = self._start_logit if self.open else None
        depth = Depth(threshold=self.threshold, unit_logit=unit_logit, load=self.load)
        return old.change_layers(self._list_layers(old).__contains__, lambda layer: replace(layer, depth=depth))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The old weights, and for each gate a weight of 0 and the bias."""
        embedding, new = weights["embed.weight"], dict(weights)
        for layer in self._list_layers(old):
            new[f"layers.{layer}.depth.gate.weight"] = embedding.new_zeros(1, old.hidden)
            new[f"layers.{layer}.depth.gate.bias"] = embedding.new_full((1,), self._start_logit)
        return new

    @property
    def _start_logit(self) -> float:
        """The bias in bfloat16, which every dtype of saved weights holds exactly."""
        return torch.tensor(self.bias, dtype=torch.bfloat16, device="cpu").item()

    def _list_layers(self, old: Blueprint) -> tuple[int, ...]:
        if self.layers is not None:
            return parse_layers(self.layers, len(old.layers))
        if len(old.layers) == 1:
            raise UsageError("depths gates every second layer, and the model has only one; name it with layers=0")
        return tuple(range(1, len(old.layers), 2))
