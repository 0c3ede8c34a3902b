"""Packed ternary weights: the codes of a trained ternary model, four in a byte, in place of its matrices.

Every logit stays as it is: the packed map computes what the trained one computes. A model in bfloat16 rounds the scales
too. The latent numbers are gone, so the packed model can be run and measured, and not trained.
"""

from dataclasses import dataclass, replace

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import UsageError
from potstill.core.types import Weights
from potstill.layers.linear.ternary import PackedTernary, Ternary
from potstill.ops.ternary import pack_codes, quantize_weight
from potstill.transforms.convert.conversion import Conversion, register_conversion

CODES, SCALE, MATRIX = ".codes", ".scale", ".weight"


@register_conversion("packed_ternary", help="the matrices of a trained ternary model in 2 bits a weight, to run it")
@dataclass(frozen=True, kw_only=True)
class ToPackedTernary(Conversion):
    """Packs the ternary maps of a trained model."""

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same layers with packed maps.

        Raises:
            UsageError: no layer is ternary, or all are packed already.
        """
        if old != old.trainable_form:
            raise UsageError("the model's matrices are packed already")
        if not any(map(_is_ternary, old.layers)):
            raise UsageError("the model has no ternary matrices to pack; make them with --to ternary, and train them")
        return old.change_layers(lambda i: _is_ternary(old.layers[i]), _pack_layer)

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """Codes and scale of each packed matrix; all other weights as they are."""
        packed = dict(weights)
        for name in weight_shapes(self.blueprint(old)):
            if name.endswith(CODES):
                base = name.removesuffix(CODES)
                codes, scale = quantize_weight(packed.pop(base + MATRIX))
                packed |= {name: pack_codes(codes), base + SCALE: scale[None]}
        return packed


def _is_ternary(layer: Layer) -> bool:
    return type(layer.linear) is Ternary


def _pack_layer(layer: Layer) -> Layer:
    linear = layer.linear
    assert isinstance(linear, Ternary)
    return replace(layer, linear=PackedTernary(linear.activations, linear.norm, linear.eps))
