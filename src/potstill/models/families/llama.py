"""Llama and Mistral: which blueprints they express, their configs, and the names of their weights, both ways.

Qwen names its weights in the same way (`families/qwen.py`), so it uses the map of names here; Gemma adds to it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from potstill.core.blueprint import Blueprint, Layer, Rotary
from potstill.core.elastic import SIZES, read_sizes
from potstill.core.errors import UnsupportedModel
from potstill.core.parts import Linear, Part
from potstill.core.serialization import freeze, thaw
from potstill.core.types import Weights
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTER_NAMES = {EMBED: "embed.weight", "model.norm.weight": "norm.weight", HEAD: "head.weight"}
PART_NAMES = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"mixer.{x}" for x in "qkvo"},
    **{f"self_attn.{x}_norm": f"mixer.{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn.{x}" for x in ("gate", "up", "down")},
}
_HF_OUTER_NAMES = {name: hf_name for hf_name, name in _OUTER_NAMES.items()}

EXTRAS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "use_cache",
)  # facts that change no number


@dataclass(frozen=True)
class Family:
    """A stock architecture: converts its config to a blueprint, and the blueprints that it expresses to its config.

    `kinds` are the kinds of its parts. `can_express` calls `matches` only for blueprints of those kinds. `part_names`
    maps Hugging Face's names of a layer's modules to ours; a `*` is the number of a part. `unstack` takes stacked
    weights of a stock state dict apart, and `stack` joins them again.
    """

    name: str
    to_blueprint: Callable[[Any], Blueprint]
    matches: Callable[[Blueprint], bool]
    to_config: Callable[[Blueprint], PreTrainedConfig]
    part_names: Mapping[str, str] = field(default_factory=lambda: PART_NAMES)
    kinds: frozenset[type[Part]] = frozenset({Attention, SwiGLU, Linear})
    unstack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    stack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict

    def can_express(self, blueprint: Blueprint) -> bool:
        """Whether this family has exactly this function: made of its kinds of parts, and with its options."""
        return blueprint.kinds() <= self.kinds and self.matches(blueprint)

    def import_weights(self, state: Mapping[str, Tensor], *, tied: bool) -> Weights:
        """A stock state dict under potstill's names; weights may share its memory.

        Raises:
            UnsupportedModel: a weight has no place in a blueprint.
        """
        return convert_weights_from_hf(self.unstack(state), self.part_names, tied=tied)

    def export_weights(self, weights: Weights) -> dict[str, Tensor]:
        """potstill's weights as a stock state dict."""
        return self.stack(convert_weights_to_hf(weights, self.part_names))


def list_attentions(blueprint: Blueprint) -> tuple[Attention, ...]:
    """The mixers of a blueprint whose mixers are all attention."""
    return cast("tuple[Attention, ...]", tuple(layer.mixer for layer in blueprint.layers))


def list_ffns(blueprint: Blueprint) -> tuple[SwiGLU, ...]:
    """The feed-forwards of a blueprint whose feed-forwards are all gated."""
    return cast("tuple[SwiGLU, ...]", tuple(layer.ffn for layer in blueprint.layers))


def convert_weights_from_hf(state: Mapping[str, Tensor], parts: Mapping[str, str], *, tied: bool) -> Weights:
    """A stock state dict under potstill's names, without the second entry of a tied head.

    Raises:
        UnsupportedModel: a weight has no place in a blueprint.
    """
    return {_convert_name_from_hf(name, parts): weight for name, weight in state.items() if not (tied and name == HEAD)}


def convert_weights_to_hf(weights: Weights, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """potstill's weights under the stock names, with a tied head as in stock state dicts."""
    hf_parts = {part: hf_part for hf_part, part in parts.items()}
    state = {_convert_name_to_hf(name, hf_parts): weight for name, weight in weights.items()}
    return state if HEAD in state else state | {HEAD: state[EMBED]}


def make_rotary(rope_parameters: Mapping[str, Any]) -> Rotary:
    """The rotary positions of a stock config's `rope_parameters`.

    Raises:
        UnsupportedModel: they differ by layer, or rotate only a part of each head.
    """
    parameters = dict(rope_parameters)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModel(
            f"rope_parameters {parameters} differ by layer; one rotation for all layers is supported"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        factor = parameters["partial_rotary_factor"]
        raise UnsupportedModel(f"partial_rotary_factor {factor} is not supported; this family rotates whole heads")
    theta = float(parameters.pop("rope_theta"))
    return Rotary(theta, None if parameters == {"rope_type": "default"} else freeze(parameters))


def make_blueprint(
    config: PreTrainedConfig, layers: tuple[Layer, ...], *extras: str, rotary: Rotary | None = None
) -> Blueprint:
    """A blueprint of `layers` with the facts that all these families name alike; `extras` names further ones to keep.

    `rotary` is for a family whose `rope_parameters` hold several rotations.

    Raises:
        UnsupportedModel: the config has attention dropout, which potstill's network does not have.
    """
    if config.attention_dropout:
        raise UnsupportedModel(f"attention_dropout is {config.attention_dropout}; set it to 0 in the config first")
    facts = {name: getattr(config, name) for name in (*EXTRAS, *extras)}
    facts |= {name: getattr(config, name) for name in (SIZES,) if hasattr(config, name)}
    return Blueprint(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        layers=layers,
        norm_eps=config.rms_norm_eps,
        rotary=rotary or make_rotary(config.rope_parameters),
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
        extras=freeze({"family": config.model_type, **facts}),
    )


def make_attention(config: PreTrainedConfig) -> Attention:
    """The heads and their width; each family adds its biases, norms and windows."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Attention(config.num_attention_heads, config.num_key_value_heads, head_dim)


def make_config_arguments(
    blueprint: Blueprint, *extras: str, ffn: SwiGLU | None = None, omits_usual_head_dim: bool = False
) -> dict[str, Any]:
    """The arguments that the configs of these families have in common, for layers of equal widths.

    `ffn` is the feed-forward whose width and activation they name, by default the first layer's. Some configs leave
    out the width of a head where all heads together are as wide as the model.
    """
    mixer, ffn = list_attentions(blueprint)[0], ffn or list_ffns(blueprint)[0]
    is_head_dim_omitted = omits_usual_head_dim and mixer.head_dim * mixer.heads == blueprint.hidden
    blueprint_facts = dict(blueprint.extras)
    # without an explicit None, an absent id would become the family's default, which is another token
    facts: dict[str, Any] = {name: None for name in EXTRAS if name.endswith("_id")}
    facts |= {name: thaw(blueprint_facts[name]) for name in (*EXTRAS, *extras) if name in blueprint_facts}
    if sizes := read_sizes(blueprint):
        facts[SIZES] = [size.to_dict() for size in sizes]
    return facts | {
        "vocab_size": blueprint.vocabulary,
        "hidden_size": blueprint.hidden,
        "intermediate_size": ffn.width,
        "num_hidden_layers": len(blueprint.layers),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "hidden_act": ffn.activation,
        "max_position_embeddings": blueprint.context,
        "rms_norm_eps": blueprint.norm_eps,
        "tie_word_embeddings": blueprint.tied,
        "rope_parameters": blueprint.rotary.parameters(),
        **({} if is_head_dim_omitted else {"head_dim": mixer.head_dim}),
    }


def has_uniform_layers(blueprint: Blueprint) -> bool:
    """Whether all layers have the same mixer, window included, and the same feed-forward."""
    return len(set(blueprint.layers)) == 1


def is_llama_like(blueprint: Blueprint) -> bool:
    """Whether it has two norms a layer, one rotation, and no scale or soft-cap anywhere."""
    is_plain_model = (
        blueprint.embedding_scale == 1
        and blueprint.logit_softcap is None
        and not blueprint.zero_centred_norms
        and rotates_whole_heads(blueprint)
    )
    plain_mixers = (mixer.scale is None and mixer.rotary is None for mixer in list_attentions(blueprint))
    return is_plain_model and all(plain_mixers) and not any(layer.post_norms for layer in blueprint.layers)


def rotates_whole_heads(blueprint: Blueprint) -> bool:
    """Whether no rotation leaves a part of a head as it is."""
    rotations = (blueprint.rotary, *(mixer.rotary for mixer in list_attentions(blueprint)))
    return all(rotary is None or rotary.fraction == 1 for rotary in rotations)


def get_layer_types(blueprint: Blueprint) -> list[str]:
    """Hugging Face's name for each layer's attention."""
    windows = (mixer.window for mixer in list_attentions(blueprint))
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _make_llama_blueprint(config: LlamaConfig) -> Blueprint:
    bias = config.attention_bias
    base = make_attention(config)
    mixer = Attention(base.heads, base.kv_heads, base.head_dim, qkv_bias=bias, out_bias=bias)
    ffn = SwiGLU(config.intermediate_size, config.mlp_bias, config.hidden_act)
    return make_blueprint(config, (Layer(mixer, ffn),) * config.num_hidden_layers, "pretraining_tp")


def _is_llama(blueprint: Blueprint) -> bool:
    mixer = list_attentions(blueprint)[0]
    is_llama_mixer = mixer.qkv_bias == mixer.out_bias and not mixer.qk_norm and mixer.window is None
    heads_divide_hidden = blueprint.hidden % mixer.heads == 0  # its config insists on that
    return is_llama_like(blueprint) and has_uniform_layers(blueprint) and is_llama_mixer and heads_divide_hidden


def _make_llama_config(blueprint: Blueprint) -> PreTrainedConfig:
    mixer, ffn = list_attentions(blueprint)[0], list_ffns(blueprint)[0]
    arguments = make_config_arguments(blueprint, "pretraining_tp")
    return LlamaConfig(**arguments, attention_bias=mixer.qkv_bias, mlp_bias=ffn.bias)


def _make_mistral_blueprint(config: MistralConfig) -> Blueprint:
    base = make_attention(config)
    mixer = Attention(base.heads, base.kv_heads, base.head_dim, window=config.sliding_window)
    ffn = SwiGLU(config.intermediate_size, activation=config.hidden_act)
    return make_blueprint(config, (Layer(mixer, ffn),) * config.num_hidden_layers)


def _is_mistral(blueprint: Blueprint) -> bool:
    mixer, ffn = list_attentions(blueprint)[0], list_ffns(blueprint)[0]
    return (
        is_llama_like(blueprint)
        and has_uniform_layers(blueprint)
        and not (mixer.qkv_bias or mixer.out_bias or mixer.qk_norm or ffn.bias)
    )


def _make_mistral_config(blueprint: Blueprint) -> PreTrainedConfig:
    return MistralConfig(**make_config_arguments(blueprint), sliding_window=list_attentions(blueprint)[0].window)


LLAMA = Family("llama", _make_llama_blueprint, _is_llama, _make_llama_config)
MISTRAL = Family("mistral", _make_mistral_blueprint, _is_mistral, _make_mistral_config)


def _convert_name_from_hf(name: str, parts: Mapping[str, str]) -> str:
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    prefix, _, suffix = name.partition("model.layers.")
    layer, _, suffix = suffix.partition(".")
    part, _, kind = suffix.rpartition(".")
    pattern, number = _split_number(part)
    if prefix or pattern not in parts:
        raise UnsupportedModel(
            f"the weight {name!r} has no place in a blueprint; is the model_type in its config right?"
        )
    return f"layers.{layer}.{parts[pattern].replace('*', number)}.{kind}"


def _convert_name_to_hf(name: str, parts: Mapping[str, str]) -> str:
    if name in _HF_OUTER_NAMES:
        return _HF_OUTER_NAMES[name]
    _, layer, suffix = name.split(".", 2)
    part, _, kind = suffix.rpartition(".")
    pattern, number = _split_number(part)
    return f"model.layers.{layer}.{parts[pattern].replace('*', number)}.{kind}"


def _split_number(part: str) -> tuple[str, str]:
    """The name of a part with `*` in place of its number, and the number."""
    number = re.search(r"(?<=\.)\d+(?=\.)", part)
    return (part, "") if number is None else (f"{part[: number.start()]}*{part[number.end() :]}", number[0])
