"""Ternary weights and 8-bit activations with straight-through gradients: BitNet b1.58 (arXiv:2402.17764, Eq. 1 to 3).

    weights       s = max(mean |W|, 1e-5)                 C = clip(round(W / s), -1, 1)      one s for each matrix
    activations   a_t = max(max_j |x_tj|, 1e-5) / 127     q_t = round(x_t / a_t)             one a for each token
    product       y_t = a_t s (C q_t) + b

`multiply_codes` is the definition of the product in integers. `quantize_linear` is the definition for training, in
ordinary autograd: the gradient passes each rounding unchanged (straight-through, arXiv:1308.3432). `ternary_linear` is
the same function in one step, perhaps with an RMSNorm of its input. It saves only its arguments for the backward, and
multiplies codes as floats, whose sums are exact in float32 up to 2^17 inputs. So both products have the same bits.

Quantizing twice is wrong: mean |s C| is s times the share of codes that are not 0, so s would shrink (by 0.69 for
Gaussian weights). Store codes and scale, and never quantize s C again.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor
from torch.nn.functional import linear

from potstill.ops.precision import get_product_dtype, upcast

SMALLEST = 1e-5  # of mean |W| and of max |x|, so that zeros are no division by 0
LARGEST_CODE = 127
CODES_PER_BYTE = 4


class TernaryWeight(NamedTuple):
    """A matrix s C: `codes` C in {-1, 0, 1} and the `scale` s, in float32 at least."""

    codes: Int8[Tensor, "N K"]
    scale: Float[Tensor, ""]

    def dequantize(self) -> Float[Tensor, "N K"]:
        """s C. Do not quantize it again: its scale would shrink."""
        return self.scale * self.codes


class PackedWeight(NamedTuple):
    """A matrix s C of `rows` rows: `codes` C as `pack_codes` stores them, and the `scale` s."""

    codes: UInt8[Tensor, "R K"]
    scale: Float[Tensor, "..."]
    rows: int


class TokenCodes(NamedTuple):
    """Activations a q: integer `codes` q from -127 to 127, stored as floats, and the `scale` a of each token."""

    codes: Float[Tensor, "*B K"]
    scale: Float[Tensor, "*B 1"]


def quantize_weight(weight: Float[Tensor, "N K"]) -> TernaryWeight:
    """The nearest ternary codes at the absmean scale; ties round to even."""
    codes, scale = _round_weight(upcast(weight))
    return TernaryWeight(codes.to(torch.int8), scale)


def quantize_tokens(x: Float[Tensor, "*B K"]) -> TokenCodes:
    """The nearest 8-bit codes at the absmax scale of each token; ties round to even."""
    x = upcast(x)
    largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return TokenCodes((x * (LARGEST_CODE / largest)).round_(), largest / LARGEST_CODE)


def multiply_codes(tokens: TokenCodes, weight: TernaryWeight) -> Float[Tensor, "*B N"]:
    """a s (C q), the definition of the product: the sums are integers."""
    sums = tokens.codes.to(torch.int64) @ weight.codes.to(torch.int64).mT
    return sums.to(tokens.codes.dtype) * (tokens.scale * weight.scale)


def normalize(x: Float[Tensor, "*B K"], gain: Float[Tensor, " K"], eps: float) -> Float[Tensor, "*B K"]:
    """gain x / sqrt(mean(x^2) + eps), the RMSNorm (arXiv:1910.07467, Eq. 4), in float32 at least."""
    x = upcast(x)
    return gain * (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt())


def quantize_linear(
    x: Float[Tensor, "*B K"],
    weight: Float[Tensor, "N K"],
    bias: Float[Tensor, " N"] | None = None,
    *,
    gain: Float[Tensor, " K"] | None = None,
    eps: float = SMALLEST,
    quantizes_tokens: bool = True,
    strength: float = 1.0,
) -> Float[Tensor, "*B N"]:
    """The definition of `ternary_linear`, in ordinary autograd."""
    x = upcast(x) if gain is None else normalize(x, gain, eps)
    if quantizes_tokens:
        tokens = quantize_tokens(x)
        x = x + strength * (tokens.scale * tokens.codes - x).detach()
    return linear(x, weight + strength * (quantize_weight(weight).dequantize() - weight).detach(), bias)


def ternary_linear(
    x: Float[Tensor, "*B K"],
    weight: Float[Tensor, "N K"] | PackedWeight,
    bias: Float[Tensor, " N"] | None = None,
    *,
    gain: Float[Tensor, " K"] | None = None,
    eps: float = SMALLEST,
    quantizes_tokens: bool = True,
    strength: float = 1.0,
) -> Float[Tensor, "*B N"]:
    """x~ W~^T + b of the ternary W~ and the 8-bit x~, with an RMSNorm of x before if it has a `gain`.

    Without `quantizes_tokens` activations are not rounded. A `strength` below 1 goes only that share of the way from
    the trained numbers to the rounded ones, in weights and activations. A packed weight gets no gradient.

    Products have the dtype of `x`, and autocast's under autocast. Norm, scales and roundings are in float32 at least.
    """
    packed = weight if isinstance(weight, PackedWeight) else None
    options = _Options(eps, quantizes_tokens, strength, get_product_dtype(x), 0 if packed is None else packed.rows)
    matrix, scale = (weight, None) if packed is None else packed[:2]
    y: Tensor = _TernaryLinear.apply(x, matrix, scale, gain, options)
    return y if bias is None else y + bias.to(y.dtype)


def pack_codes(codes: Int8[Tensor, "N K"]) -> UInt8[Tensor, "R K"]:
    """Four codes + 1 in a byte: row r has rows r, R + r, 2R + r and 3R + r from its low bits on, with R = ceil(N / 4).

    This is the layout of transformers' BitNet integration. Bits without a row are 0.
    """
    size = -(-len(codes) // CODES_PER_BYTE)
    packed = torch.zeros(size, codes.shape[1], dtype=torch.uint8, device=codes.device)
    for place, rows in enumerate(codes.split(size)):
        packed[: len(rows)] |= (rows + 1).to(torch.uint8) << 2 * place
    return packed


def unpack_codes(packed: UInt8[Tensor, "R K"], rows: int) -> Int8[Tensor, "{rows} K"]:
    """The first `rows` rows of the codes that `pack_codes` packed."""
    places = [(packed >> 2 * place & 3).to(torch.int8) - 1 for place in range(CODES_PER_BYTE)]
    return torch.cat(places)[:rows]


class _Options(NamedTuple):
    eps: float
    quantizes_tokens: bool
    strength: float
    dtype: torch.dtype  # of the products
    rows: int  # of packed codes


class _TernaryLinear(torch.autograd.Function):
    """Computes both operands a second time in the backward, so that neither is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, gain: Tensor | None, options: _Options
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale, gain)
        ctx.options = options
        with torch.autocast(x.device.type, enabled=False):
            inputs, token_scale = _compute_inputs(x, gain, options)
            matrix, weight_scale = _compute_matrix(weight, scale, options)
            y = linear(inputs, matrix)
            return (y * (token_scale * weight_scale)).to(options.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, gain = ctx.saved_tensors
        options: _Options = ctx.options
        x_gradient, weight_gradient, gain_gradient = None, None, None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[1] and scale is None:
                inputs, token_scale = _compute_inputs(x, gain, options)
                slope = (upstream * token_scale).to(options.dtype)
                weight_gradient = (slope.flatten(0, -2).mT @ inputs.flatten(0, -2)).to(weight.dtype)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
                matrix, weight_scale = _compute_matrix(weight, scale, options)
                x_gradient = upcast(upstream.to(options.dtype) @ matrix) * weight_scale
                if gain is not None:
                    x_gradient, gain_gradient = _differentiate_norm(x_gradient, x, gain, options.eps)
                x_gradient = x_gradient.to(x.dtype)
        return x_gradient, weight_gradient, None, gain_gradient, None


def _compute_inputs(x: Tensor, gain: Tensor | None, options: _Options) -> tuple[Tensor, Tensor | float]:
    """The left operand of the product, and the factor of each token."""
    x = x if gain is None else normalize(x, gain, options.eps)
    if not options.quantizes_tokens:
        return x.to(options.dtype), 1.0
    codes, scale = quantize_tokens(x)
    if options.strength == 1:
        return codes.to(options.dtype), scale
    return torch.lerp(upcast(x), scale * codes, options.strength).to(options.dtype), 1.0


def _compute_matrix(weight: Tensor, scale: Tensor | None, options: _Options) -> tuple[Tensor, Tensor | float]:
    """The right operand of the product, `[N K]`, and its factor."""
    if scale is not None:
        return unpack_codes(weight, options.rows).to(options.dtype), scale
    wide_weight = upcast(weight)
    codes, scale = _round_weight(wide_weight)
    if options.strength == 1:
        return codes.to(options.dtype), scale
    return torch.lerp(wide_weight, scale * codes, options.strength).to(options.dtype), 1.0


def _differentiate_norm(upstream: Tensor, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The gradients of `normalize` by x and gain."""
    x = upcast(x)
    factor = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit = x * factor
    gain_gradient = (upstream * unit).flatten(0, -2).sum(0).to(gain.dtype)
    slope = upstream * gain
    return factor * (slope - unit * (slope * unit).mean(-1, keepdim=True)), gain_gradient


def _round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes as floats, scale)."""
    scale = weight.abs().mean().clamp(min=SMALLEST)
    return (weight * (1 / scale)).round_().clamp_(-1, 1), scale
