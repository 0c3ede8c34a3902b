"""Gemma 3 (`gemma3_text`): four zero-centred norms a layer, scaled embeddings, windows with a rotation of their own.

Its embedding scale is always the square root of its width. One that was cut in width keeps the scale that it was
trained with, is then no Gemma 3 any more, and is saved as our own architecture.
"""

from dataclasses import replace
from typing import Any

from transformers import Gemma3TextConfig, PreTrainedConfig

from potstill.core.blueprint import Attention, Blueprint, Layer, SwiGLU
from potstill.core.errors import UnsupportedModel
from potstill.models.families.llama import (
    PARTS,
    Family,
    attention_in,
    blueprint_in,
    config_facts,
    layer_types,
    rotary_in,
)

FULL, SLIDING = "full_attention", "sliding_attention"
_KEPT = ("sliding_window",)  # transformers wants one even where no layer slides
_PARTS = PARTS | {
    "post_attention_layernorm": "mixer_post_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_post_norm",
}


def _in(config: Gemma3TextConfig) -> Blueprint:
    _require_causal(config)
    bias, scalar = config.attention_bias, config.query_pre_attn_scalar
    scale = None if scalar == config.head_dim else scalar**-0.5
    whole = replace(attention_in(config), qkv_bias=bias, out_bias=bias, qk_norm=True, scale=scale)
    rotary, local = (rotary_in(config.rope_parameters[kind]) for kind in (FULL, SLIDING))
    sliding = replace(whole, window=config.sliding_window, rotary=None if local == rotary else local)
    ffn = SwiGLU(config.intermediate_size, activation=config.hidden_activation)
    made = {kind: Layer(mixer, ffn, post_norms=True) for kind, mixer in ((FULL, whole), (SLIDING, sliding))}
    blueprint = blueprint_in(config, tuple(made[kind] for kind in config.layer_types), *_KEPT, rotary=rotary)
    return replace(
        blueprint,
        embedding_scale=config.hidden_size**0.5,
        zero_centred_norms=True,
        logit_softcap=config.final_logit_softcapping,
    )


def _require_causal(config: Gemma3TextConfig) -> None:
    if config.attn_logit_softcapping is not None:
        raise UnsupportedModel(
            f"attn_logit_softcapping is {config.attn_logit_softcapping}; soft-capped attention is not supported"
        )
    if config.use_bidirectional_attention:
        raise UnsupportedModel("use_bidirectional_attention is set; only causal models can be taken apart")


def _expresses(blueprint: Blueprint) -> bool:
    layer, mixer = blueprint.layers[0], blueprint.layers[0].mixer
    inner = layer.post_norms and mixer.qk_norm and mixer.qkv_bias == mixer.out_bias and not layer.ffn.bias
    outer = blueprint.zero_centred_norms and blueprint.embedding_scale == blueprint.hidden**0.5
    divides = blueprint.hidden % mixer.heads == 0  # its config insists on that
    return _alike(blueprint) and inner and outer and divides and _scalar(mixer) ** -0.5 == mixer.softmax_scale


def _alike(blueprint: Blueprint) -> bool:
    """Layers differ by one window, with one rotation of its own, and by nothing else."""
    places = {(layer.mixer.window, layer.mixer.rotary) for layer in blueprint.layers}
    sliding = {place for place in places if place[0] is not None}
    others = {replace(layer, mixer=replace(layer.mixer, window=None, rotary=None)) for layer in blueprint.layers}
    return len(others) == 1 and len(sliding) <= 1 and places - sliding <= {(None, None)}


def _scalar(mixer: Attention) -> int:
    """The whole number whose inverse root is the scale of attention, if there is one."""
    return max(1, round(mixer.softmax_scale**-2))


def _out(blueprint: Blueprint) -> PreTrainedConfig:
    shared, mixer = config_facts(blueprint, *_KEPT), blueprint.layers[0].mixer
    shared["hidden_activation"] = shared.pop("hidden_act")
    return Gemma3TextConfig(
        **(shared | _windows_out(blueprint)),
        layer_types=layer_types(blueprint),
        attention_bias=mixer.qkv_bias,
        query_pre_attn_scalar=_scalar(mixer),
        final_logit_softcapping=blueprint.logit_softcap,
    )


def _windows_out(blueprint: Blueprint) -> dict[str, Any]:
    rotary = {FULL: blueprint.rotary.parameters()}
    sliding = next((layer.mixer for layer in blueprint.layers if layer.mixer.window is not None), None)
    if sliding is None:
        return {"rope_parameters": rotary}
    rotary[SLIDING] = (sliding.rotary or blueprint.rotary).parameters()
    return {"rope_parameters": rotary, "sliding_window": sliding.window}


GEMMA3 = Family("gemma3_text", _in, _expresses, _out, _PARTS)
