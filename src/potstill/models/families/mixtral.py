"""Mixtral: Mistral's attention, and in every layer the same number of experts with normalized weights."""

from typing import cast

from transformers import MixtralConfig, PreTrainedConfig

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import UnsupportedModel
from potstill.layers.ffn.experts import Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.llama import (
    Family,
    has_uniform_layers,
    is_llama_like,
    list_attentions,
    make_attention,
    make_blueprint,
    make_config_arguments,
)
from potstill.models.families.stacked_experts import (
    EXPERT_KINDS,
    EXPERT_PART_NAMES,
    ROUTER_EXTRAS,
    has_plain_experts,
    list_experts,
    stack_experts,
    unstack_experts,
)


def _make_blueprint(config: MixtralConfig) -> Blueprint:
    if config.router_jitter_noise:
        raise UnsupportedModel(f"router_jitter_noise is {config.router_jitter_noise}; set it to 0 in the config first")
    base = make_attention(config)
    mixer = Attention(base.heads, base.kv_heads, base.head_dim, window=config.sliding_window)
    expert = SwiGLU(config.intermediate_size, activation=config.hidden_act)
    ffn = Experts(expert, config.num_local_experts, config.num_experts_per_tok, "normalized")
    return make_blueprint(config, (Layer(mixer, ffn),) * config.num_hidden_layers, *ROUTER_EXTRAS)


def _is_mixtral(blueprint: Blueprint) -> bool:
    mixer = list_attentions(blueprint)[0]
    return (
        is_llama_like(blueprint)
        and has_uniform_layers(blueprint)
        and has_plain_experts(blueprint)
        and list_experts(blueprint)[0].weighting == "normalized"
        and list_experts(blueprint)[0].shared is None
        and not (mixer.qkv_bias or mixer.out_bias or mixer.qk_norm)
    )


def _make_config(blueprint: Blueprint) -> PreTrainedConfig:
    experts = list_experts(blueprint)[0]
    return MixtralConfig(
        **make_config_arguments(blueprint, *ROUTER_EXTRAS, ffn=cast(SwiGLU, experts.expert), omits_usual_head_dim=True),
        sliding_window=list_attentions(blueprint)[0].window,
        num_local_experts=experts.count,
        num_experts_per_tok=experts.top_k,
    )


MIXTRAL = Family(
    "mixtral",
    _make_blueprint,
    _is_mixtral,
    _make_config,
    EXPERT_PART_NAMES,
    EXPERT_KINDS,
    unstack_experts,
    stack_experts,
)
