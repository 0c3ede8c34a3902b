"""Qwen2, Qwen2.5 (both `qwen2`) and Qwen3: Llama's shape with biases on q, k, v, or with normalised heads.

Layers may alternate between the whole document and a window (`layer_types`). Weights are named as Llama's.
"""

from dataclasses import replace

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from potstill.core.blueprint import Attention, Blueprint, Layer, SwiGLU
from potstill.models.families.llama import Family, attention_in, blueprint_in, config_facts, layer_types, plain

_KEPT = ("max_window_layers",)


def _layers_in(config: PreTrainedConfig, mixer: Attention) -> tuple[Layer, ...]:
    ffn = SwiGLU(config.intermediate_size, activation=config.hidden_act)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    return tuple(Layer(replace(mixer, window=windows[kind]), ffn) for kind in config.layer_types)


def _windowless(blueprint: Blueprint) -> set[Layer]:
    return {replace(layer, mixer=replace(layer.mixer, window=None)) for layer in blueprint.layers}


def _alike(blueprint: Blueprint) -> bool:
    windows = {layer.mixer.window for layer in blueprint.layers} - {None}
    return (
        plain(blueprint) and len(_windowless(blueprint)) == 1 and len(windows) <= 1 and not blueprint.layers[0].ffn.bias
    )


def _windows_out(blueprint: Blueprint) -> dict[str, object]:
    widest = max((layer.mixer.window for layer in blueprint.layers if layer.mixer.window), default=None)
    windows = {"use_sliding_window": widest is not None, "sliding_window": widest}
    return windows | {"layer_types": layer_types(blueprint)}


def _qwen2_in(config: Qwen2Config) -> Blueprint:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mixer = Attention(config.num_attention_heads, config.num_key_value_heads, width, qkv_bias=True)
    return blueprint_in(config, _layers_in(config, mixer), *_KEPT)


def _qwen2_expresses(blueprint: Blueprint) -> bool:
    mixer = blueprint.layers[0].mixer
    return _alike(blueprint) and mixer.qkv_bias and not mixer.out_bias and not mixer.qk_norm


def _qwen2_out(blueprint: Blueprint) -> PreTrainedConfig:
    shared, mixer = config_facts(blueprint, *_KEPT), blueprint.layers[0].mixer
    if mixer.head_dim * mixer.heads == blueprint.hidden:  # the usual case, which its config does not spell out
        del shared["head_dim"]
    return Qwen2Config(**shared, **_windows_out(blueprint))


def _qwen3_in(config: Qwen3Config) -> Blueprint:
    bias = config.attention_bias
    mixer = replace(attention_in(config), qkv_bias=bias, out_bias=bias, qk_norm=True)
    return blueprint_in(config, _layers_in(config, mixer), *_KEPT)


def _qwen3_expresses(blueprint: Blueprint) -> bool:
    mixer = blueprint.layers[0].mixer
    return _alike(blueprint) and mixer.qkv_bias == mixer.out_bias and mixer.qk_norm


def _qwen3_out(blueprint: Blueprint) -> PreTrainedConfig:
    bias = blueprint.layers[0].mixer.qkv_bias
    return Qwen3Config(**config_facts(blueprint, *_KEPT), attention_bias=bias, **_windows_out(blueprint))


QWEN2 = Family("qwen2", _qwen2_in, _qwen2_expresses, _qwen2_out)
QWEN3 = Family("qwen3", _qwen3_in, _qwen3_expresses, _qwen3_out)
