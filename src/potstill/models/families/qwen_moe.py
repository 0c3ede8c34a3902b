"""Qwen2-MoE, whose tokens all read a shared expert, and Qwen3-MoE without one. Some of their layers may be dense."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.serialization import thaw
from potstill.layers.ffn.experts import Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.families.llama import (
    Family,
    is_llama_like,
    list_attentions,
    make_attention,
    make_blueprint,
    make_config_arguments,
)
from potstill.models.families.qwen import WINDOW_EXTRAS, make_window_arguments
from potstill.models.families.stacked_experts import (
    EXPERT_KINDS,
    EXPERT_PART_NAMES,
    ROUTER_EXTRAS,
    has_plain_experts,
    list_experts,
    stack_experts,
    unstack_experts,
)

_PLACES = ("decoder_sparse_step", "mlp_only_layers")  # which layers have experts
_EXTRAS = (*ROUTER_EXTRAS, *_PLACES, "intermediate_size")  # the last one is that of dense layers


def _has_experts(index: int, places: dict[str, Any]) -> bool:
    return index not in (places["mlp_only_layers"] or ()) and (index + 1) % places["decoder_sparse_step"] == 0


def _list_layers(config: PreTrainedConfig, mixers: Iterable[Attention], shared: SwiGLU | None) -> tuple[Layer, ...]:
    activation, places = config.hidden_act, {name: getattr(config, name) for name in _PLACES}
    weighting = "normalized" if config.norm_topk_prob else "softmax"
    expert = SwiGLU(config.moe_intermediate_size, activation=activation)
    experts = Experts(expert, config.num_experts, config.num_experts_per_tok, weighting, shared)
    dense = SwiGLU(config.intermediate_size, activation=activation)
    return tuple(Layer(mixer, experts if _has_experts(i, places) else dense) for i, mixer in enumerate(mixers))


def _is_qwen_moe_like(blueprint: Blueprint) -> bool:
    """Whether mixers differ in one window at most, and dense layers are equal and without bias."""
    mixers = list_attentions(blueprint)
    dense = {layer.ffn for layer in blueprint.layers if isinstance(layer.ffn, SwiGLU)}
    return (
        is_llama_like(blueprint)
        and has_plain_experts(blueprint)
        and list_experts(blueprint)[0].weighting in ("normalized", "softmax")
        and len({replace(mixer, window=None) for mixer in mixers}) == 1
        and len({mixer.window for mixer in mixers} - {None}) <= 1
        and len(dense) <= 1
        and all(not ffn.bias and ffn.activation == _get_expert(blueprint).activation for ffn in dense)
    )


def _get_expert(blueprint: Blueprint) -> SwiGLU:
    return cast(SwiGLU, list_experts(blueprint)[0].expert)


def _make_arguments(blueprint: Blueprint, *extras: str) -> dict[str, Any]:
    """The arguments that both configs have in common."""
    experts, expert = list_experts(blueprint)[0], _get_expert(blueprint)
    dense = next((layer.ffn for layer in blueprint.layers if isinstance(layer.ffn, SwiGLU)), None)
    dense_width = blueprint.get_extra("intermediate_size", expert.width) if dense is None else dense.width
    arguments = make_config_arguments(blueprint, *extras, *_EXTRAS, ffn=expert, omits_usual_head_dim=True)
    return (
        arguments
        | _make_places(blueprint)
        | {
            "intermediate_size": dense_width,
            "moe_intermediate_size": expert.width,
            "num_experts": experts.count,
            "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": experts.weighting == "normalized",
        }
    )


def _make_places(blueprint: Blueprint) -> dict[str, Any]:
    """The places of the layers with experts: those of the original config if they are right, else a list."""
    places = {name: thaw(value) for name in _PLACES if (value := blueprint.get_extra(name)) is not None}
    has_experts = [isinstance(layer.ffn, Experts) for layer in blueprint.layers]
    if len(places) == len(_PLACES) and has_experts == [_has_experts(i, places) for i in range(len(has_experts))]:
        return places
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, has_some in enumerate(has_experts) if not has_some]}


def _make_qwen2_blueprint(config: Qwen2MoeConfig) -> Blueprint:
    mixer = replace(make_attention(config), qkv_bias=config.qkv_bias)
    windows = {"full_attention": None, "sliding_attention": config.sliding_window}
    mixers = (replace(mixer, window=windows[kind]) for kind in config.layer_types)
    shared = SwiGLU(config.shared_expert_intermediate_size, activation=config.hidden_act)
    return make_blueprint(config, _list_layers(config, mixers, shared), *WINDOW_EXTRAS, *_EXTRAS)


def _is_qwen2_moe(blueprint: Blueprint) -> bool:
    if not _is_qwen_moe_like(blueprint):
        return False
    mixer, shared, expert = list_attentions(blueprint)[0], list_experts(blueprint)[0].shared, _get_expert(blueprint)
    has_plain_shared_expert = isinstance(shared, SwiGLU) and shared == replace(expert, width=shared.width)
    return has_plain_shared_expert and not (mixer.out_bias or mixer.qk_norm)


def _make_qwen2_config(blueprint: Blueprint) -> PreTrainedConfig:
    return Qwen2MoeConfig(
        **_make_arguments(blueprint, *WINDOW_EXTRAS),
        **make_window_arguments(blueprint),
        qkv_bias=list_attentions(blueprint)[0].qkv_bias,
        shared_expert_intermediate_size=cast(SwiGLU, list_experts(blueprint)[0].shared).width,
    )


def _make_qwen3_blueprint(config: Qwen3MoeConfig) -> Blueprint:
    bias = config.attention_bias
    mixer = replace(make_attention(config), qkv_bias=bias, out_bias=bias, qk_norm=True, window=config.sliding_window)
    layers = _list_layers(config, [mixer] * config.num_hidden_layers, None)
    return make_blueprint(config, layers, *_EXTRAS)


def _is_qwen3_moe(blueprint: Blueprint) -> bool:
    mixers = set(list_attentions(blueprint))
    if not _is_qwen_moe_like(blueprint) or len(mixers) > 1:
        return False
    (mixer,) = mixers
    return mixer.qkv_bias == mixer.out_bias and mixer.qk_norm and list_experts(blueprint)[0].shared is None


def _make_qwen3_config(blueprint: Blueprint) -> PreTrainedConfig:
    mixer = list_attentions(blueprint)[0]
    return Qwen3MoeConfig(
        **_make_arguments(blueprint),
        attention_bias=mixer.qkv_bias,
        use_sliding_window=mixer.window is not None,
        sliding_window=mixer.window,
    )


QWEN2_MOE = Family(
    "qwen2_moe",
    _make_qwen2_blueprint,
    _is_qwen2_moe,
    _make_qwen2_config,
    EXPERT_PART_NAMES,
    EXPERT_KINDS,
    unstack_experts,
    stack_experts,
)
QWEN3_MOE = replace(
    QWEN2_MOE,
    name="qwen3_moe",
    to_blueprint=_make_qwen3_blueprint,
    matches=_is_qwen3_moe,
    to_config=_make_qwen3_config,
)
