"""Linear maps with weights in {-1, 0, 1} times one number: trained ones, and packed ones for inference.

Source: BitNet b1.58 (arXiv:2402.17764); `ops/ternary.py` has the formulas. With `norm` an RMSNorm stands inside each
map, on its input, as in MatMul-free LM (arXiv:2406.02528, section 3.2).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from potstill.core.errors import UsageError
from potstill.core.parts import Linear, Shapes, kind
from potstill.layers.norm import RMSNorm
from potstill.layers.registry import builds
from potstill.ops.ternary import CODES_PER_BYTE, PackedWeight, pack_codes, quantize_weight, ternary_linear


@kind("ternary")
@dataclass(frozen=True)
class Ternary(Linear):
    """s C x + b: the codes C in {-1, 0, 1} and the scale s come from a trained matrix, anew in each forward.

    With `activations`, x is rounded to 8 bits for each token. With `norm`, x is normalized before, with `eps`.
    """

    has_exact_cuts: ClassVar[bool] = False  # all weights share the scale

    activations: bool = True
    norm: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise UsageError(f"the eps of a ternary map's norm is {self.eps}; it must be positive")

    @classmethod
    def examples(cls) -> "tuple[Linear, ...]":
        """BitNet's; with a norm, and activations that are not rounded."""
        return (cls(), cls(activations=False, norm=True, eps=1e-3))

    def shapes(self, inputs: int, outputs: int, *, bias: bool = False) -> Shapes:
        """The trained matrix, bias, and gain of the norm."""
        return super().shapes(inputs, outputs, bias=bias) | self._norm_shapes(inputs)

    def _norm_shapes(self, inputs: int) -> Shapes:
        return {"norm.weight": (inputs,)} if self.norm else {}


@kind("packed_ternary")
@dataclass(frozen=True)
class PackedTernary(Ternary):
    """A `Ternary` map that stores its codes, four in a byte, and its scale, in place of the trained matrix."""

    @classmethod
    def examples(cls) -> "tuple[Linear, ...]":
        """MatMul-free LM's."""
        return (cls(norm=True),)

    @property
    def trainable_form(self) -> Ternary:
        """The map with the trained matrix."""
        return Ternary(self.activations, self.norm, self.eps)

    def shapes(self, inputs: int, outputs: int, *, bias: bool = False) -> Shapes:
        """Bias, codes (bytes), scale, and gain of the norm."""
        weights: Shapes = {"bias": (outputs,)} if bias else {}
        weights |= {"codes": (-(-outputs // CODES_PER_BYTE), inputs), "scale": (1,)}
        return weights | self._norm_shapes(inputs)


@builds(Ternary)
class TernaryLinear(nn.Linear):
    """The map of a trained matrix `[N K]`, with straight-through gradients.

    `strength` is 1. Below it, only that share of the rounding happens: at 0 the map is that of the trained numbers.
    """

    def __init__(self, facts: Ternary, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.facts, self.strength = facts, 1.0
        self.norm = _make_norm(facts, inputs)

    def forward(self, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """The outputs of each token."""
        gain = None if self.norm is None else self.norm.weight
        return ternary_linear(
            x,
            self.weight,
            self.bias,
            gain=gain,
            eps=self.facts.eps,
            quantizes_tokens=self.facts.activations,
            strength=self.strength,
        )


@builds(PackedTernary)
class PackedTernaryLinear(nn.Module):
    """The map of packed codes, a matrix of zeros until codes are loaded. The codes and the scale are not trained."""

    codes: Tensor
    scale: Tensor

    def __init__(self, facts: PackedTernary, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.facts, self.in_features, self.out_features = facts, inputs, outputs
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.register_buffer("codes", pack_codes(torch.zeros(outputs, inputs, dtype=torch.int8)))
        self.register_buffer("scale", torch.ones(1))
        self.norm = _make_norm(facts, inputs)

    @torch.no_grad()
    def draw_weight(self, std: float, rng: torch.Generator | None = None) -> None:
        """Takes the codes and the scale of a matrix from N(0, std^2)."""
        weight = self.scale.new_empty(self.out_features, self.in_features).normal_(0.0, std, generator=rng)
        codes, scale = quantize_weight(weight)
        self.codes.copy_(pack_codes(codes))
        self.scale.copy_(scale)

    def forward(self, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """The outputs of each token."""
        return ternary_linear(
            x,
            PackedWeight(self.codes, self.scale, self.out_features),
            self.bias,
            gain=None if self.norm is None else self.norm.weight,
            eps=self.facts.eps,
            quantizes_tokens=self.facts.activations,
        )

    def extra_repr(self) -> str:
        """Sizes and facts, for printing."""
        return f"{self.in_features}, {self.out_features}, {self.facts}"


def set_strength(model: nn.Module, strength: float) -> None:
    """Lets that share of the rounding happen in every trained ternary map of `model`."""
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.strength = strength


def _make_norm(facts: Ternary, inputs: int) -> RMSNorm | None:
    return RMSNorm(inputs, eps=facts.eps) if facts.norm else None
