"""Ternary products in C are those of integers, and models with ternary weights decode with them."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decode.test_runner import random_ids, whole_text_logits
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.blueprint import Blueprint, Layer
from potstill.decode.native import library
from potstill.decode.native.network import NativeNetwork, read_network
from potstill.decode.native.reader import NativeReader
from potstill.decode.native.ternary import order_codes
from potstill.decode.runner import ModelRunner
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.linear.ternary import PackedTernary, Ternary
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights
from potstill.models.families.registry import export_model
from potstill.ops.ternary import TernaryWeight, multiply_codes, normalize, quantize_tokens

pytestmark = pytest.mark.skipif(library.load_library() is None, reason="there is no C compiler")

FACTS = [Ternary(), Ternary(norm=True), Ternary(activations=False), PackedTernary(), PackedTernary(False, True)]


def multiply(code: Any, weight: TernaryWeight, x: Tensor, *, threads: int, **pointers: Tensor) -> Tensor:
    rows, columns = weight.codes.shape
    ordered, scales, y = order_codes(weight.codes), weight.scale.repeat(rows), torch.empty(len(x), rows)
    tensors = {"weight": ordered, "scale": scales, **pointers}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    matrix = library.Matrix(**addresses, rows=rows, columns=columns, dtype=3, eps=1e-5)
    code.potstill_multiply(ctypes.byref(matrix), x.data_ptr(), y.data_ptr(), len(x), threads)
    return y


def check_products(code: Any) -> None:
    for rows, columns in ((1, 1), (7, 63), (9, 64), (24, 130), (33, 576)):
        codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
        codes[0] = 1  # with equal inputs, the largest sums
        weight, bias, gain = TernaryWeight(codes, torch.tensor(0.37)), torch.randn(rows), torch.rand(columns)
        x = torch.randn(9, columns)
        x[0] = 1.0
        x[1] = 0.0
        expected = multiply_codes(quantize_tokens(x), weight)
        normal = multiply_codes(quantize_tokens(normalize(x, gain, 1e-5)), weight)
        for tokens, threads in ((1, 1), (2, 2), (3, 1), (4, 2), (9, 3)):
            y = multiply(code, weight, x[:tokens].contiguous(), threads=threads)
            assert torch.equal(y, expected[:tokens])
            y = multiply(code, weight, x[:tokens].contiguous(), threads=threads, bias=bias)
            torch.testing.assert_close(y, expected[:tokens] + bias, rtol=1e-6, atol=1e-6)
        y = multiply(code, weight, x, threads=2, gain=gain)
        assert ((y - normal).abs() > 1e-4 * normal.abs().max()).float().mean() < 0.05  # a rounding may differ


def test_products_have_the_bits_of_integers() -> None:
    check_products(library.load_library())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("-mavx2", "-mfma"), ()])
def test_products_without_later_instructions_do_too(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "OPTIONAL_FLAGS", ((*flags, "-fopenmp"), flags))
    check_products(library.load_library.__wrapped__())


def make_model(facts: Ternary) -> PreTrainedModel:
    layers = (Layer(Attention(4, 2, 10, qkv_bias=True), SwiGLU(70), linear=facts), Layer(Attention(2, 2, 8), SwiGLU(9)))
    backbone = Backbone(Blueprint(97, 40, layers, context=64, tied=True))
    init_weights(backbone, std=0.3)
    return export_model(backbone).eval()


def make_runner(model: PreTrainedModel, **options: Any) -> ModelRunner:
    runner = ModelRunner(model, vocabulary=97, slots=3, **options)
    assert isinstance(runner.reader, NativeReader)
    return runner


@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_a_model_decodes_natively_with_its_own_logits(facts: Ternary) -> None:
    model, ids = make_model(facts), random_ids(21, 5)
    expected = whole_text_logits(model, ids)
    runner = make_runner(model)
    torch.testing.assert_close(runner.prefill(0, ids).logits, expected, rtol=1e-3, atol=1e-3)
    runner.prefill(1, ids[:-4])
    together = runner.forward([1], torch.tensor([ids[-4:]])).logits[0, -1]
    assert torch.equal(together, runner.prefill(2, ids).logits)
    assert make_runner(model.to(torch.bfloat16)).prefill(0, ids).logits.isfinite().all()


def test_a_ternary_matrix_has_a_quarter_of_the_bytes_of_int8() -> None:
    sizes = []
    for facts in (Ternary(), Ternary(activations=False)):  # the codes of the latter are int8
        layer = Layer(Attention(4, 2, 16), SwiGLU(128), linear=facts)
        model = export_model(Backbone(Blueprint(97, 64, (layer,), context=16)))
        tensors = NativeNetwork(*read_network(model))._tensors
        sizes.append(sum(tensor.nbytes for tensor in tensors if tensor.dtype in (torch.uint8, torch.int8)))
    assert 4 * sizes[0] == sizes[1] == sum(w.numel() for w in model.backbone.layers[0].parameters() if w.ndim == 2)
