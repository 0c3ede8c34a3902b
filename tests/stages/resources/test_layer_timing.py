"""Layers that differ are timed apart, and weigh by their operations."""

from typing import Any

import pytest
import torch

from potstill.core.blueprint import Blueprint, Layer
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.stages.resources import layer_timing
from potstill.stages.resources.activation_memory import measure_autograd_bytes
from potstill.stages.resources.layer_timing import Rate

NARROW, WIDE = (Layer(Attention(2, 2, 8), SwiGLU(width)) for width in (16, 64))


def test_the_rate_of_a_hybrid_is_the_mean_over_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[Layer, ...]] = []

    def measure(blueprint: Blueprint, *_: Any) -> tuple[Rate, Rate]:
        timed.append(blueprint.layers)
        return (Rate(1.0, 10.0), Rate(2.0, 0.0)) if blueprint.layers[0] == NARROW else (Rate(4.0, 40.0), Rate(8.0, 0.0))

    monkeypatch.setattr(layer_timing, "_measure_equal_layers", measure)
    blueprint = Blueprint(32, 16, (NARROW, WIDE, NARROW), context=64)
    arguments = (9, torch.float32, torch.device("cpu"), 0)
    forward, backward = layer_timing._measure_layers(blueprint, *arguments)
    assert timed == [(NARROW,) * 2, (WIDE,) * 2]
    # per token: 4 16^2 + 3 16 width multiply-adds, and 2 16 5 over the tokens that it sees
    narrow, wide = 2 * (1024 + 768 + 160), 1024 + 3072 + 160
    assert forward.per_operation == pytest.approx((narrow + 4 * wide) / (narrow + wide))
    assert forward.fixed == pytest.approx(10 * forward.per_operation)
    assert backward.per_operation == pytest.approx(2 * forward.per_operation)


def test_the_bytes_of_a_hybrid_are_the_mean_over_its_layers() -> None:
    one, other, both = (
        measure_autograd_bytes(Blueprint(32, 16, layers, context=64), dtype=torch.float32)
        for layers in ((NARROW,), (WIDE,), (NARROW, WIDE, WIDE))
    )
    assert one.per_token_layer < other.per_token_layer
    assert both.per_token_layer == pytest.approx((one.per_token_layer + 2 * other.per_token_layer) / 3)
