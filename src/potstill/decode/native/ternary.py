"""The ternary maps of a model in the order in which `ternary.h` reads them."""

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad

from potstill.core.types import Weights
from potstill.layers.linear.ternary import PackedTernary, PackedTernaryLinear, Ternary, TernaryLinear
from potstill.ops.ternary import quantize_weight, unpack_codes

ROWS, COLUMNS = 8, 64  # of which whole groups are stored


def read_ternary(
    weights: Weights, name: str, facts: Ternary, rows: int
) -> tuple[UInt8[Tensor, " C"] | Int8[Tensor, "N K"], Float[Tensor, ""]]:
    """The codes and the scale of the map called `name`, of `rows` outputs; trained weights are rounded.

    Codes are packed for maps that round their inputs, and int8 for others.
    """
    if isinstance(facts, PackedTernary):
        codes, scale = unpack_codes(weights[f"{name}.codes"], rows), weights[f"{name}.scale"][0].float()
    else:
        codes, scale = quantize_weight(weights[f"{name}.weight"].float())
    return order_codes(codes) if facts.activations else codes, scale


def order_codes(codes: Int8[Tensor, "N K"]) -> UInt8[Tensor, " C"]:
    """Codes plus 1 in blocks of 4 rows and 64 columns; bits 2i and 2i + 1 of byte 16r + j are row r, column 16i + j."""
    rows, columns = codes.shape
    padded = pad(codes, (0, -columns % COLUMNS, 0, -rows % ROWS), value=-1) + 1
    places = padded.to(torch.uint8).unflatten(0, (-1, 4)).unflatten(2, (-1, 4, 16)).permute(3, 0, 2, 1, 4)
    ordered = places[0]
    for place in range(1, 4):
        ordered = ordered | places[place] << 2 * place
    return ordered.flatten()


def rounds_activations(model: nn.Module) -> bool:
    """Whether a layer of the model rounds the inputs of its maps."""
    return any(
        isinstance(module, TernaryLinear | PackedTernaryLinear) and module.facts.activations
        for module in model.modules()
    )
