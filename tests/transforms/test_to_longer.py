"""A longer context: the frequencies are those of their definitions and of transformers, and the model is stock."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.models.small import SMALL
from tests.transforms.small import build
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from potstill.core.blueprint import Blueprint, Layer, Rotary
from potstill.core.errors import UsageError
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.layers.rotary import frequencies
from potstill.models.families.registry import export_model, import_model
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.to_longer import METHODS, ToLonger

K, THETA, CONTEXT, FACTOR = 64, 1e4, 2048, 8.0
HEAD = Blueprint(23, K, (Layer(Attention(1, 1, K), SwiGLU(10)),), context=CONTEXT)


def define(method: str) -> tuple[np.ndarray, float]:
    """(frequencies, factor on cosines and sines) of each method, written out from its paper, in float64."""
    pairs = np.arange(K // 2)
    w = THETA ** (-2 * pairs / K)
    turns = CONTEXT * w / (2 * np.pi)
    if method == "linear":
        return w / FACTOR, 1.0
    if method == "ntk":
        return (THETA * FACTOR ** (K / (K - 2))) ** (-2 * pairs / K), 1.0
    if method == "base":
        return 1e6 ** (-2 * pairs / K), 1.0
    if method == "llama3":
        g = np.clip((turns - 1) / (4 - 1), 0, 1)
        return (1 - g) * w / FACTOR + g * w, 1.0
    first, last = (K * math.log(CONTEXT / (n * 2 * math.pi)) / (2 * math.log(THETA)) for n in (32, 1))
    g = 1 - np.clip((pairs - math.floor(first)) / (math.ceil(last) - math.floor(first)), 0, 1)
    return (1 - g) * w / FACTOR + g * w, 0.1 * math.log(FACTOR) + 1


def scale(method: str) -> Blueprint:
    return ToLonger(factor=FACTOR, method=method).blueprint(HEAD)


@pytest.mark.parametrize("method", METHODS)
def test_frequencies_are_those_of_the_definition(method: str) -> None:
    new = scale(method)
    radians, factor = frequencies(new.rotary, head_dim=K, context=new.context)
    expected, expected_factor = define(method)
    assert new.context == 16384
    assert np.array(radians) == pytest.approx(expected, rel=2e-6)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("method", METHODS)
def test_angles_are_those_of_a_stock_llama(method: str) -> None:
    new = scale(method)
    config = LlamaConfig(
        hidden_size=K,
        num_attention_heads=1,
        max_position_embeddings=new.context,
        rope_parameters=new.rotary.parameters(),
    )
    ids = torch.tensor([[0, 1, 2047, 2048, 16383]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), ids)
    radians, factor = frequencies(new.rotary, head_dim=K, context=new.context)
    angles = ids[0, :, None].float() * torch.tensor(radians)
    torch.testing.assert_close(cos[0, :, : K // 2], angles.cos() * factor, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0, :, K // 2 :], angles.sin() * factor, rtol=0, atol=1e-6)


def test_golden_numbers() -> None:
    """By hand: 0.1 ln 8 + 1; 10,000 * 8^(64/62); the slowest pair / 8; 32 turns in 2,048 positions at pair 8.07."""
    assert frequencies(scale("yarn").rotary, head_dim=K, context=CONTEXT)[1] == pytest.approx(1.2079442)
    assert scale("ntk").rotary.theta == pytest.approx(85_550.4, abs=0.5)
    slowest = THETA ** (-62 / 64)
    for method in ("linear", "ntk", "llama3", "yarn"):
        radians, _ = frequencies(scale(method).rotary, head_dim=K, context=CONTEXT)
        assert radians[-1] == pytest.approx(slowest / 8, rel=1e-5)
        assert radians[0] == pytest.approx(1 / 8 if method == "linear" else 1.0)
    yarn, _ = frequencies(scale("yarn").rotary, head_dim=K, context=CONTEXT)
    original, _ = frequencies(HEAD.rotary, head_dim=K, context=CONTEXT)
    assert [a == pytest.approx(b) for a, b in zip(yarn, original, strict=True)] == [pair <= 8 for pair in range(32)]


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_model_has_the_same_logits_beyond_the_original_context(method: str, tmp_path: Path) -> None:
    original = import_model(LlamaForCausalLM(LlamaConfig(**SMALL)).eval())
    converted = apply_transform(ToLonger(factor=4.0, method=method), original)
    export_model(converted).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is LlamaForCausalLM
    assert stock.config.max_position_embeddings == 256
    ids = torch.randint(97, (1, 256))
    positions = torch.arange(256)[None]
    with torch.no_grad():
        hidden = converted(ids, positions)
        torch.testing.assert_close(converted.head().logits(hidden[0]), stock(ids).logits[0], rtol=1e-4, atol=1e-4)
        before = original(ids[:, :64], positions[:, :64])
    torch.testing.assert_close(hidden[:, 0], before[:, 0])
    assert (hidden[:, 63] - before[:, 63]).abs().max() > 1e-2


def test_interpolated_positions_say_what_the_original_ones_said(float64: None) -> None:
    original = build("llama tied")
    converted = apply_transform(ToLonger(factor=4.0, method="linear"), original)
    ids, positions = torch.randint(23, (1, 40)), torch.arange(40)[None]
    x = y = original.embed(ids)
    places = original._make_positions(positions, None, None)
    spread = replace(converted._make_positions(positions, None, None), ids=4 * positions)
    for old_block, new_block in zip(original.layers, converted.layers, strict=True):
        x, y = old_block(x, places, None)[0], new_block(y, spread, None)[0]
    torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ntk", "base"])
def test_a_change_of_theta_twice_is_one_of_both(method: str) -> None:
    theta = [None, None] if method == "ntk" else [1e5, 1e6]
    twice = HEAD
    for each in theta:
        twice = ToLonger(factor=2.0, method=method, theta=each).blueprint(twice)
    once = ToLonger(factor=4.0, method=method, theta=theta[1]).blueprint(HEAD)
    assert twice.rotary.theta == pytest.approx(once.rotary.theta)
    assert twice.context == once.context


def test_a_gemma_scales_its_global_layers_alone(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        **SMALL, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    )
    original = import_model(Gemma3ForCausalLM(config).eval())
    converted = apply_transform(ToLonger(factor=4.0), original)
    assert converted.blueprint.layers == original.blueprint.layers
    export_model(converted).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.config.rope_parameters["full_attention"]["factor"] == 4.0
    assert stock.config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    ids = torch.randint(97, (1, 200))
    with torch.no_grad():
        hidden = converted(ids, torch.arange(200)[None])
        torch.testing.assert_close(converted.head().logits(hidden[0]), stock(ids).logits[0], rtol=1e-4, atol=1e-4)


OWN = Attention(1, 1, K, rotary=Rotary(50.0))


@pytest.mark.parametrize(
    ("options", "attentions", "message"),
    [
        ({}, [OWN], "no layer of the model has its shared"),
        ({}, [Attention(1, 1, K), OWN], "changes one rotation"),
        ({}, [Attention(1, 1, K), replace(OWN, window=4096)], "changes one rotation"),
        ({"method": "ntk"}, [Attention(1, 1, 2)], "this model has 2"),
        ({"method": "ntk"}, [Attention(1, 1, 8), Attention(1, 1, 16)], "this model has 8, 16"),
        ({"factor": 1.0001}, [Attention(1, 1, K)], "adds no position"),
        ({"method": "base", "theta": 1e4}, [Attention(1, 1, K)], "not above the model's 10000"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, float], attentions: list[Attention], message: str) -> None:
    old = replace(HEAD, layers=tuple(Layer(attention, SwiGLU(10)) for attention in attentions))
    with pytest.raises(UsageError, match=message):
        ToLonger(**options).blueprint(old)
