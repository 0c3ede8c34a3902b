"""Ternary linear maps: the packed one is the trained one, and codes stay bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import UsageError
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.linear.ternary import PackedTernary, PackedTernaryLinear, Ternary, TernaryLinear
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights
from potstill.models.families.registry import export_model
from potstill.ops.ternary import pack_codes, quantize_weight


@pytest.mark.parametrize("facts", [Ternary(), Ternary(norm=True), Ternary(activations=False)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_packed_map_has_the_bits_of_the_trained_one(facts: Ternary, bias: bool) -> None:
    trained = TernaryLinear(facts, 6, 5, bias=bias)
    packed = PackedTernaryLinear(PackedTernary(facts.activations, facts.norm, facts.eps), 6, 5, bias=bias)
    assert packed.facts.trainable_form == facts
    weights = trained.state_dict()
    codes, scale = quantize_weight(weights.pop("weight"))
    packed.load_state_dict(weights | {"codes": pack_codes(codes), "scale": scale[None]})
    x = torch.randn(2, 3, 6)
    assert torch.equal(packed(x), trained(x))


@torch.no_grad()
def test_without_strength_it_is_the_map_of_the_trained_numbers() -> None:
    layer, x = TernaryLinear(Ternary(), 6, 5, bias=True), torch.randn(3, 6)
    layer.strength = 0.0
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))


def test_codes_stay_bytes_in_any_dtype_on_disk_and_in_memory(tmp_path: Path) -> None:
    layer = Layer(Attention(2, 1, 4), SwiGLU(10), linear=PackedTernary())
    backbone = Backbone(Blueprint(30, 8, (layer,), context=16))
    init_weights(backbone, std=0.4)
    export_model(backbone).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    opened = model.backbone.layers[0].mixer.q
    assert opened.codes.dtype == torch.uint8
    assert torch.equal(opened.codes, backbone.layers[0].mixer.q.codes)
    assert opened.scale.dtype == model.backbone.embed.weight.dtype == torch.bfloat16


def test_a_fresh_packed_map_is_zero_and_a_norm_needs_an_eps() -> None:
    assert not PackedTernaryLinear(PackedTernary(), 6, 5, bias=False)(torch.randn(3, 6)).any()
    with pytest.raises(UsageError, match="must be positive"):
        replace(Ternary(), eps=0.0)
