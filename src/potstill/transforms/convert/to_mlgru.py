"""Attention to MLGRU, the recurrence of MatMul-free LM (arXiv:2406.02528, section 3.3).

The candidate starts from the values of the attention and the output from its output matrix: a token that attends evenly
to its past is much like the memory of a recurrence. Forget and gate are drawn from N(0, 0.02^2), as are all matrices of
the paper. No function is kept, so the result has to be trained: on text, or by distillation from the original. With
`--to ternary:norm=true` after it, the model is a MatMul-free LM.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import UsageError
from potstill.core.options import Option
from potstill.core.parts import DENSE
from potstill.core.types import Weights
from potstill.layers.mixers.attention import Attention
from potstill.layers.mixers.mlgru import MLGRU
from potstill.transforms.convert.conversion import Conversion, parse_layers, register_conversion, repeat_shared_heads

INITIAL_STD = 0.02
SEED = 1


@register_conversion("mlgru", help="attention to the recurrence of MatMul-free LM, which has to be trained anew")
@dataclass(frozen=True, kw_only=True)
class ToMLGRU(Conversion):
    """Replaces attention by a recurrence of as many channels as its values have for all heads."""

    layers: str | None = Option[str | None](None, "Layers such as 0-3-5; by default all.").field()
    bounds: bool = Option(True, "Later layers forget less: layer l of L keeps at least the share l / L.").field()

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same feed-forwards behind recurrences.

        Raises:
            UsageError: a layer has no attention, has biases or ternary matrices, or there is no such layer.
        """
        layers = parse_layers(self.layers, len(old.layers))
        for i in layers:
            _check_layer(i, old.layers[i])
        mixers = {i: self._make_mixer(old, i) for i in layers}
        converted = (replace(layer, mixer=mixers.get(i, layer.mixer)) for i, layer in enumerate(old.layers))
        return replace(old, layers=tuple(converted))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """Values and output of the attention, and fresh forget and gate matrices."""
        generator = torch.Generator().manual_seed(SEED)
        new: dict[str, Tensor] = {}
        for name, shape in weight_shapes(self.blueprint(old)).items():
            if name in weights:
                new[name] = weights[name]
            elif ".candidate." in name:
                values = weights[name.replace(".candidate.", ".v.")]
                mixer = old.layers[int(name.split(".")[1])].mixer
                assert isinstance(mixer, Attention)
                new[name] = repeat_shared_heads(values, mixer)
            else:
                fresh = torch.empty(shape).normal_(0.0, INITIAL_STD, generator=generator)
                new[name] = fresh.to(weights["norm.weight"])
        return new

    def _make_mixer(self, old: Blueprint, i: int) -> MLGRU:
        mixer = old.layers[i].mixer
        assert isinstance(mixer, Attention)
        return MLGRU(mixer.heads * mixer.head_dim, i / len(old.layers) if self.bounds else 0.0)


def _check_layer(i: int, layer: Layer) -> None:
    mixer = layer.mixer
    if not isinstance(mixer, Attention):
        raise UsageError(f"layer {i} has {mixer.kind_name} and no attention; name other layers with mlgru:layers=")
    if mixer.qkv_bias or mixer.out_bias:
        raise UsageError(f"the attention of layer {i} has biases, which a recurrence has not; convert another model")
    if layer.linear != DENSE:
        raise UsageError(f"layer {i} has {layer.linear.kind_name} matrices; convert to mlgru first, and then those")
