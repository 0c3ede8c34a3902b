"""Gemma 3 (`gemma3_text`): four zero-centered norms per layer, scaled embeddings, windows with a separate rotation.

Its embedding scale is always the square root of its width. A Gemma 3 pruned in width keeps the scale of its training.
So it is not a stock Gemma 3, and potstill saves it as its own architecture.
"""

from dataclasses import replace
from typing import Any

from transformers import Gemma3TextConfig, PreTrainedConfig

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import UnsupportedModel
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.llama import (
    PART_NAMES,
    Family,
    get_layer_types,
    list_attentions,
    list_ffns,
    make_attention,
    make_blueprint,
    make_config_arguments,
    make_rotary,
    rotates_whole_heads,
)

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"
_EXTRAS = ("sliding_window",)  # transformers wants one even where no layer slides
_PART_NAMES = PART_NAMES | {
    "post_attention_layernorm": "mixer_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}


def _make_blueprint(config: Gemma3TextConfig) -> Blueprint:
    _check_causal(config)
    bias, scalar = config.attention_bias, config.query_pre_attn_scalar
    scale = None if scalar == config.head_dim else scalar**-0.5
    full_mixer = replace(make_attention(config), qkv_bias=bias, out_bias=bias, qk_norm=True, scale=scale)
    rotary, sliding_rotary = (make_rotary(config.rope_parameters[kind]) for kind in (FULL_ATTENTION, SLIDING_ATTENTION))
    sliding_mixer = replace(
        full_mixer, window=config.sliding_window, rotary=None if sliding_rotary == rotary else sliding_rotary
    )
    ffn = SwiGLU(config.intermediate_size, activation=config.hidden_activation)
    layer_by_kind = {
        kind: Layer(mixer, ffn, post_norms=True)
        for kind, mixer in ((FULL_ATTENTION, full_mixer), (SLIDING_ATTENTION, sliding_mixer))
    }
    blueprint = make_blueprint(
        config, tuple(layer_by_kind[kind] for kind in config.layer_types), *_EXTRAS, rotary=rotary
    )
    return replace(
        blueprint,
        embedding_scale=config.hidden_size**0.5,
        zero_centred_norms=True,
        logit_softcap=config.final_logit_softcapping,
    )


def _check_causal(config: Gemma3TextConfig) -> None:
    if config.attn_logit_softcapping is not None:
        raise UnsupportedModel(
            f"attn_logit_softcapping is {config.attn_logit_softcapping}; soft-capped attention is not supported"
        )
    if config.use_bidirectional_attention:
        raise UnsupportedModel("use_bidirectional_attention is set; potstill imports only causal models")


def _is_gemma(blueprint: Blueprint) -> bool:
    layer, mixer, ffn = blueprint.layers[0], list_attentions(blueprint)[0], list_ffns(blueprint)[0]
    is_gemma_layer = layer.post_norms and mixer.qk_norm and mixer.qkv_bias == mixer.out_bias and not ffn.bias
    is_gemma_model = (
        blueprint.zero_centred_norms
        and blueprint.embedding_scale == blueprint.hidden**0.5
        and rotates_whole_heads(blueprint)
    )
    heads_divide_hidden = blueprint.hidden % mixer.heads == 0  # its config insists on that
    return (
        _differs_only_in_window(blueprint)
        and is_gemma_layer
        and is_gemma_model
        and heads_divide_hidden
        and _query_pre_attn_scalar(mixer) ** -0.5 == mixer.softmax_scale
    )


def _differs_only_in_window(blueprint: Blueprint) -> bool:
    """Whether layers differ only in one window, which may have another rotation."""
    mixers = list_attentions(blueprint)
    windows = {(mixer.window, mixer.rotary) for mixer in mixers}
    sliding_windows = {window for window in windows if window[0] is not None}
    windowless_layers = {
        replace(layer, mixer=replace(mixer, window=None, rotary=None))
        for layer, mixer in zip(blueprint.layers, mixers, strict=True)
    }
    return len(windowless_layers) == 1 and len(sliding_windows) <= 1 and windows - sliding_windows <= {(None, None)}


def _query_pre_attn_scalar(mixer: Attention) -> int:
    """The whole number whose inverse root is the scale of attention, if there is one."""
    return max(1, round(mixer.softmax_scale**-2))


def _make_config(blueprint: Blueprint) -> PreTrainedConfig:
    arguments, mixer = make_config_arguments(blueprint, *_EXTRAS), list_attentions(blueprint)[0]
    arguments["hidden_activation"] = arguments.pop("hidden_act")
    return Gemma3TextConfig(
        **(arguments | _make_window_arguments(blueprint)),
        layer_types=get_layer_types(blueprint),
        attention_bias=mixer.qkv_bias,
        query_pre_attn_scalar=_query_pre_attn_scalar(mixer),
        final_logit_softcapping=blueprint.logit_softcap,
    )


def _make_window_arguments(blueprint: Blueprint) -> dict[str, Any]:
    rope_parameters = {FULL_ATTENTION: blueprint.rotary.parameters()}
    sliding_mixer = next((mixer for mixer in list_attentions(blueprint) if mixer.window is not None), None)
    if sliding_mixer is None:
        return {"rope_parameters": rope_parameters}
    rope_parameters[SLIDING_ATTENTION] = (sliding_mixer.rotary or blueprint.rotary).parameters()
    return {"rope_parameters": rope_parameters, "sliding_window": sliding_mixer.window}


GEMMA3 = Family("gemma3_text", _make_blueprint, _is_gemma, _make_config, _PART_NAMES)
