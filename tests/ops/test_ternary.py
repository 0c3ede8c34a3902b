"""Ternary weights and 8-bit activations: codes, packing, the product in integers, and straight-through gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear, rms_norm
from transformers.integrations.bitnet import pack_weights

from potstill.ops.ternary import (
    PackedWeight,
    multiply_codes,
    normalize,
    pack_codes,
    quantize_linear,
    quantize_tokens,
    quantize_weight,
    ternary_linear,
    unpack_codes,
)

FORMS = [{}, {"quantizes_tokens": False}, {"gain": True}, {"gain": True, "strength": 0.3}, {"strength": 0.0}]


def operands(rows: int = 5, inputs: int = 7, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(2, 3, inputs), torch.randn(rows, inputs), torch.randn(rows)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def test_codes_are_those_of_the_paper() -> None:
    weight = torch.tensor([[2.0, -0.2, 0.9], [-1.0, 0.4, 1.5]])  # mean |W| is 1
    codes, scale = quantize_weight(weight)
    assert codes.tolist() == [[1, 0, 1], [-1, 0, 1]]
    assert scale == 1
    tokens = quantize_tokens(torch.tensor([[2.54, -1.27, 0.011], [0.0, 0.0, 0.0]]))
    assert tokens.codes.tolist() == [[127, -64, 1], [0, 0, 0]]  # 63.5 rounds to even
    torch.testing.assert_close(tokens.scale.flatten(), torch.tensor([0.02, 1e-5 / 127]))


def test_ties_round_to_even() -> None:
    assert quantize_weight(torch.tensor([[0.5, 1.5, -0.5, -1.5]])).codes.tolist() == [[0, 1, 0, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [7, 576, 4096])
def test_the_product_of_floats_has_the_bits_of_the_product_of_integers(dtype: torch.dtype, inputs: int) -> None:
    x, weight, _ = operands(9, inputs, dtype=dtype)
    weight[0] = 9.0  # the largest sums: every code 1
    x[0, 0] = 1.0
    assert torch.equal(ternary_linear(x, weight), multiply_codes(quantize_tokens(x), quantize_weight(weight)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_fused_form_is_the_definition_in_value_and_every_gradient(form: dict, has_bias: bool) -> None:
    x, weight, bias = operands()
    gain = torch.rand(7, dtype=torch.float64) + 0.5
    options = {key: value for key, value in form.items() if key != "gain"}
    outcomes = []
    for function in (ternary_linear, quantize_linear):
        leaves = {"x": x.clone(), "weight": weight.clone()} | ({"bias": bias.clone()} if has_bias else {})
        leaves |= {"gain": gain.clone()} if "gain" in form else {}
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = function(**leaves, **options)
        loss = (y * torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape)).sum()
        outcomes.append((y, *torch.autograd.grad(loss, list(leaves.values()))))
    for fast, definition in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)


def test_straight_through_gradients_are_dense_gradients_at_the_rounded_operands() -> None:
    x, weight, _ = operands()
    tokens, ternary = quantize_tokens(x), quantize_weight(weight)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    rounded = [(tokens.scale * tokens.codes).requires_grad_(), ternary.dequantize().requires_grad_()]
    dense = torch.autograd.grad(linear(*rounded).square().sum(), rounded)
    for gradient, expected in zip(
        torch.autograd.grad(ternary_linear(*leaves).square().sum(), leaves), dense, strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_the_norm_is_that_of_finite_differences() -> None:
    x, weight, _ = operands()
    gain = torch.rand(7, dtype=torch.float64) + 0.5

    def compute(x: Tensor, gain: Tensor) -> Tensor:
        return ternary_linear(x, weight, gain=gain, eps=1e-3, quantizes_tokens=False)

    assert torch.autograd.gradcheck(compute, (x.requires_grad_(), gain.requires_grad_()))


def test_scaling_the_weight_scales_the_output_and_scaling_the_input_of_the_norm_changes_nothing() -> None:
    x, weight, _ = operands()
    y = ternary_linear(x, weight)
    assert torch.equal(quantize_weight(4 * weight).codes, quantize_weight(weight).codes)
    torch.testing.assert_close(ternary_linear(x, 4 * weight), 4 * y, rtol=1e-12, atol=0)
    torch.testing.assert_close(ternary_linear(8 * x, weight), 8 * y, rtol=1e-12, atol=0)
    gain = torch.ones(7, dtype=torch.float64)
    normal = ternary_linear(x, weight, gain=gain, eps=0.0)
    torch.testing.assert_close(ternary_linear(8 * x, weight, gain=gain, eps=0.0), normal, rtol=1e-12, atol=0)


def test_quantizing_again_shrinks_the_scale_by_the_share_of_codes_that_are_not_zero() -> None:
    ternary = quantize_weight(torch.randn(400, 500, generator=torch.Generator().manual_seed(1)))
    share = ternary.codes.abs().double().mean().item()
    again = quantize_weight(ternary.dequantize())
    assert torch.equal(again.codes, ternary.codes)
    assert math.isclose(again.scale / ternary.scale, share, rel_tol=1e-5)
    assert abs(share - 0.69) < 0.01  # of Gaussian weights


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 17), inputs=st.integers(1, 5), seed=st.integers(0, 99))
def test_packing_returns_every_code_in_the_layout_of_transformers(rows: int, inputs: int, seed: int) -> None:
    codes = torch.randint(-1, 2, (rows, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes)
    assert packed.shape == (math.ceil(rows / 4), inputs)
    assert torch.equal(unpack_codes(packed, rows), codes)
    assert torch.equal(packed, pack_weights(codes.clone()))  # which adds 1 to its argument


@pytest.mark.parametrize("quantizes_tokens", [False, True])
def test_a_packed_weight_has_the_outputs_and_the_input_gradient_of_the_trained_one(quantizes_tokens: bool) -> None:
    x, weight, bias = operands(6)
    codes, scale = quantize_weight(weight)
    packed = PackedWeight(pack_codes(codes), scale[None], 6)
    outcomes = []
    for matrix in (weight, packed):
        leaf = x.clone().requires_grad_()
        y = ternary_linear(leaf, matrix, bias, quantizes_tokens=quantizes_tokens)
        outcomes.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_under_autocast_products_are_in_bfloat16_and_gradients_in_the_dtype_of_the_weights() -> None:
    x, weight, _ = operands(8, 32, dtype=torch.float32)
    gain = torch.ones(32, requires_grad=True)
    leaves = [x.requires_grad_(), weight.requires_grad_(), gain]
    exact = ternary_linear(x, weight, gain=gain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ternary_linear(x, weight, gain=gain)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=1e-2, atol=1e-6)
    for gradient, expected in zip(
        torch.autograd.grad(y.float().sum(), leaves), torch.autograd.grad(exact.sum(), leaves), strict=True
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, expected, rtol=0.05, atol=0.05)


def test_the_backward_keeps_its_arguments_alone() -> None:
    x, weight, _ = operands(8, 32)
    gain, saved = torch.ones(32, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.data_ptr()), lambda tensor: tensor
    ):
        ternary_linear(x.requires_grad_(), weight.requires_grad_(), gain=gain)
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in (x, weight, gain))


def test_the_norm_is_that_of_the_models() -> None:
    x, gain = torch.randn(3, 9), torch.rand(9)
    torch.testing.assert_close(normalize(x, gain, 1e-3), rms_norm(x, (9,), gain, 1e-3))
