"""Qwen3.5's text models without experts (`qwen3_5_text`): Gated DeltaNet, and gated attention in every fourth layer.

Norms are zero-centered, and rotary positions turn a part of each head. A token of text has the same position on the
three axes of its rotary positions, so they are ordinary ones; `mrope_section` is kept for the config.
"""

from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedConfig, Qwen3_5TextConfig

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import UnsupportedModel
from potstill.core.parts import Linear
from potstill.core.serialization import thaw
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.delta_net import DeltaNet
from potstill.layers.mixers.gated_attention import GatedAttention
from potstill.models.families.gated_delta import (
    GATED_DELTA_PART_NAMES,
    join_gated_delta,
    read_delta_net,
    split_gated_delta,
    write_delta_net,
)
from potstill.models.families.llama import (
    Family,
    list_ffns,
    make_attention,
    make_blueprint,
    make_config_arguments,
    make_rotary,
)

FULL, LINEAR = "full_attention", "linear_attention"
AXES = ("mrope_section", "mrope_interleaved")  # facts of images, which change no number of a text
PARTIAL = "partial_rotary_factor"


def _make_blueprint(config: Qwen3_5TextConfig) -> Blueprint:
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"hidden_act is {config.hidden_act}; the convolutions of a DeltaNet have silu")
    base, bias = make_attention(config), config.attention_bias
    attention = GatedAttention(base.heads, base.kv_heads, base.head_dim, bias, bias, qk_norm=True)
    mixers = {FULL: attention, LINEAR: read_delta_net(config)}
    ffn = SwiGLU(config.intermediate_size, activation=config.hidden_act)
    layers = tuple(Layer(mixers[kind], ffn) for kind in config.layer_types)
    parameters = {name: value for name, value in config.rope_parameters.items() if name not in (*AXES, PARTIAL)}
    rotary = replace(make_rotary(parameters), fraction=config.rope_parameters.get(PARTIAL, 1.0))
    axes = {name: config.rope_parameters[name] for name in AXES if name in config.rope_parameters}
    blueprint = make_blueprint(config, layers, rotary=rotary)
    return replace(blueprint, zero_centred_norms=True).update_extras(axes)


def _is_qwen3_5(blueprint: Blueprint) -> bool:
    mixers = {layer.mixer for layer in blueprint.layers}
    attentions = [mixer for mixer in mixers if isinstance(mixer, GatedAttention)]
    delta_nets = [mixer for mixer in mixers if isinstance(mixer, DeltaNet)]
    if not len(attentions) == len(delta_nets) == 1:  # its config has one size of each
        return False
    (attention,), (delta_net,) = attentions, delta_nets
    bias, ffn = attention.qkv_bias, list_ffns(blueprint)[0]
    plain = GatedAttention(attention.heads, attention.kv_heads, attention.head_dim, bias, bias, qk_norm=True)
    return (
        attention == plain
        and delta_net == replace(delta_net, gated=True, allow_neg_eigval=False, norm_eps=blueprint.norm_eps)
        and {replace(layer, mixer=plain) for layer in blueprint.layers} == {Layer(plain, SwiGLU(ffn.width))}
        and blueprint.zero_centred_norms
        and blueprint.embedding_scale == 1
        and blueprint.logit_softcap is None
    )


def _make_config(blueprint: Blueprint) -> PreTrainedConfig:
    kinds = [LINEAR if isinstance(layer.mixer, DeltaNet) else FULL for layer in blueprint.layers]
    attention_layers = tuple(layer for layer in blueprint.layers if isinstance(layer.mixer, GatedAttention))
    arguments = make_config_arguments(replace(blueprint, layers=attention_layers))
    axes: dict[str, Any] = {name: thaw(blueprint.get_extra(name)) for name in AXES if blueprint.get_extra(name)}
    delta_net = next(layer.mixer for layer in blueprint.layers if isinstance(layer.mixer, DeltaNet))
    changed = {
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "attention_bias": cast(GatedAttention, attention_layers[0].mixer).qkv_bias,
        "rope_parameters": {**arguments["rope_parameters"], PARTIAL: blueprint.rotary.fraction, **axes},
    }
    return Qwen3_5TextConfig(**arguments | changed, **write_delta_net(delta_net))


QWEN3_5 = Family(
    "qwen3_5_text",
    _make_blueprint,
    _is_qwen3_5,
    _make_config,
    GATED_DELTA_PART_NAMES,
    frozenset({GatedAttention, DeltaNet, SwiGLU, Linear}),
    split_gated_delta,
    join_gated_delta,
)
