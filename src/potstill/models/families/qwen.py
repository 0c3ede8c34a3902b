"""Qwen2, Qwen2.5 (both `qwen2`) and Qwen3: Llama's shape with biases on q, k, v, or with normalized heads.

Layers may alternate between the whole document and a window (`layer_types`). Weights are named as Llama's.
"""

from dataclasses import replace

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from potstill.core.blueprint import Blueprint, Layer
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.llama import (
    Family,
    get_layer_types,
    is_llama_like,
    list_attentions,
    list_ffns,
    make_attention,
    make_blueprint,
    make_config_arguments,
)

WINDOW_EXTRAS = ("max_window_layers",)


def _make_layers(config: PreTrainedConfig, mixer: Attention) -> tuple[Layer, ...]:
    ffn = SwiGLU(config.intermediate_size, activation=config.hidden_act)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return tuple(Layer(replace(mixer, window=windows[kind]), ffn) for kind in config.layer_types)


def _strip_windows(blueprint: Blueprint) -> set[Layer]:
    pairs = zip(blueprint.layers, list_attentions(blueprint), strict=True)
    return {replace(layer, mixer=replace(mixer, window=None)) for layer, mixer in pairs}


def _is_qwen_like(blueprint: Blueprint) -> bool:
    windows = {mixer.window for mixer in list_attentions(blueprint)} - {None}
    return (
        is_llama_like(blueprint)
        and len(_strip_windows(blueprint)) == 1
        and len(windows) <= 1
        and not list_ffns(blueprint)[0].bias
    )


def make_window_arguments(blueprint: Blueprint) -> dict[str, object]:
    """The arguments of Qwen's configs for layers of which some may have a window."""
    max_window = max((mixer.window for mixer in list_attentions(blueprint) if mixer.window), default=None)
    arguments = {"use_sliding_window": max_window is not None, "sliding_window": max_window}
    return arguments | {"layer_types": get_layer_types(blueprint)}


def _make_qwen2_blueprint(config: Qwen2Config) -> Blueprint:
    mixer = replace(make_attention(config), qkv_bias=True)
    return make_blueprint(config, _make_layers(config, mixer), *WINDOW_EXTRAS)


def _is_qwen2(blueprint: Blueprint) -> bool:
    mixer = list_attentions(blueprint)[0]
    return _is_qwen_like(blueprint) and mixer.qkv_bias and not mixer.out_bias and not mixer.qk_norm


def _make_qwen2_config(blueprint: Blueprint) -> PreTrainedConfig:
    arguments = make_config_arguments(blueprint, *WINDOW_EXTRAS, omits_usual_head_dim=True)
    return Qwen2Config(**arguments, **make_window_arguments(blueprint))


def _make_qwen3_blueprint(config: Qwen3Config) -> Blueprint:
    bias = config.attention_bias
    mixer = replace(make_attention(config), qkv_bias=bias, out_bias=bias, qk_norm=True)
    return make_blueprint(config, _make_layers(config, mixer), *WINDOW_EXTRAS)


def _is_qwen3(blueprint: Blueprint) -> bool:
    mixer = list_attentions(blueprint)[0]
    return _is_qwen_like(blueprint) and mixer.qkv_bias == mixer.out_bias and mixer.qk_norm


def _make_qwen3_config(blueprint: Blueprint) -> PreTrainedConfig:
    bias = list_attentions(blueprint)[0].qkv_bias
    return Qwen3Config(
        **make_config_arguments(blueprint, *WINDOW_EXTRAS), attention_bias=bias, **make_window_arguments(blueprint)
    )


QWEN2 = Family("qwen2", _make_qwen2_blueprint, _is_qwen2, _make_qwen2_config)
QWEN3 = Family("qwen3", _make_qwen3_blueprint, _is_qwen3, _make_qwen3_config)
