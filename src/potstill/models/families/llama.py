"""Llama and Mistral: which blueprints they express, their configs, and the names of their weights, both ways.

Qwen spells its weights in the same way (`families/qwen.py`), so the map of names is shared from here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from potstill.core.blueprint import Attention, Blueprint, Layer, Rotary, SwiGLU, frozen
from potstill.core.errors import UnsupportedModel
from potstill.core.types import Weights

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTER = {EMBED: "embed.weight", "model.norm.weight": "norm.weight", HEAD: "head.weight"}
_PARTS = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"mixer.{x}" for x in "qkvo"},
    **{f"self_attn.{x}_norm": f"mixer.{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn.{x}" for x in ("gate", "up", "down")},
}
_STOCK_PARTS = {ours: theirs for theirs, ours in _PARTS.items()}
_STOCK_OUTER = {ours: theirs for theirs, ours in _OUTER.items()}

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")  # facts that change no number


@dataclass(frozen=True)
class Family:
    """A stock architecture: how its config reads as a blueprint, which blueprints it expresses, and as what config."""

    name: str
    read: Callable[[Any], Blueprint]
    expresses: Callable[[Blueprint], bool]
    config_out: Callable[[Blueprint], PreTrainedConfig]


def weights_in(state: Mapping[str, Tensor], *, tied: bool) -> Weights:
    """A stock state dict under our names; the head that a tied model lists twice is left out.

    Raises:
        UnsupportedModel: a weight has no place in a blueprint.
    """
    return {_ours(name): weight for name, weight in state.items() if not (tied and name == HEAD)}


def weights_out(weights: Weights) -> dict[str, Tensor]:
    """Our weights under the stock names; a tied model gets its head spelled out, as stock state dicts have it."""
    state = {_theirs(name): weight for name, weight in weights.items()}
    return state if HEAD in state else state | {HEAD: state[EMBED]}


def rotary_in(config: PreTrainedConfig) -> Rotary:
    """The rotary positions of a stock config.

    Raises:
        UnsupportedModel: they differ by layer, or turn a part of each head only.
    """
    parameters = dict(config.rope_parameters)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModel(
            f"rope_parameters {parameters} differ by layer; one rotation for all layers is supported"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        factor = parameters["partial_rotary_factor"]
        raise UnsupportedModel(f"partial_rotary_factor {factor} is not supported; the whole head must turn")
    theta = float(parameters.pop("rope_theta"))
    return Rotary(theta, None if parameters == {"rope_type": "default"} else frozen(parameters))


def blueprint_in(config: PreTrainedConfig, layers: tuple[Layer, ...], *extras: str) -> Blueprint:
    """What every family of this shape says in the same words; `extras` names further facts to keep.

    Raises:
        UnsupportedModel: it drops attention weights at random while training, which the network does not.
    """
    if config.attention_dropout:
        raise UnsupportedModel(f"attention_dropout is {config.attention_dropout}; set it to 0 in the config first")
    kept = {name: getattr(config, name) for name in (*KEPT, *extras)}
    return Blueprint(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        layers=layers,
        norm_eps=config.rms_norm_eps,
        rotary=rotary_in(config),
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
        extras=frozen({"family": config.model_type, **kept}),
    )


def attention_in(config: PreTrainedConfig) -> Attention:
    """Heads and their width; biases, norms and windows are each family's own."""
    return Attention(config.num_attention_heads, config.num_key_value_heads, config.head_dim)


def config_facts(blueprint: Blueprint, *extras: str) -> dict[str, Any]:
    """The arguments that the configs of these families share, for layers that are all alike."""
    mixer, ffn = blueprint.layers[0].mixer, blueprint.layers[0].ffn
    known = dict(blueprint.extras)
    # an absent id is said to be None, else it would become the family's default, which is another token
    facts: dict[str, Any] = {name: None for name in KEPT if name.endswith("_id")}
    facts |= {name: _thawed(known[name]) for name in (*KEPT, *extras) if name in known}
    return facts | {
        "vocab_size": blueprint.vocabulary,
        "hidden_size": blueprint.hidden,
        "intermediate_size": ffn.width,
        "num_hidden_layers": len(blueprint.layers),
        "num_attention_heads": mixer.heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "hidden_act": ffn.activation,
        "max_position_embeddings": blueprint.context,
        "rms_norm_eps": blueprint.norm_eps,
        "tie_word_embeddings": blueprint.tied,
        "rope_parameters": blueprint.rotary.parameters(),
    }


def uniform(blueprint: Blueprint) -> bool:
    """All layers have the same mixer and feed-forward; windows included."""
    return len(set(blueprint.layers)) == 1


def _llama_in(config: LlamaConfig) -> Blueprint:
    bias = config.attention_bias
    base = attention_in(config)
    mixer = Attention(base.heads, base.kv_heads, base.head_dim, qkv_bias=bias, out_bias=bias)
    ffn = SwiGLU(config.intermediate_size, config.mlp_bias, config.hidden_act)
    return blueprint_in(config, (Layer(mixer, ffn),) * config.num_hidden_layers, "pretraining_tp")


def _llama_expresses(blueprint: Blueprint) -> bool:
    mixer = blueprint.layers[0].mixer
    plain = mixer.qkv_bias == mixer.out_bias and not mixer.qk_norm and mixer.window is None
    return uniform(blueprint) and plain and blueprint.hidden % mixer.heads == 0  # its config insists on the last


def _llama_out(blueprint: Blueprint) -> PreTrainedConfig:
    mixer, ffn = blueprint.layers[0].mixer, blueprint.layers[0].ffn
    shared = config_facts(blueprint, "pretraining_tp")
    return LlamaConfig(**shared, attention_bias=mixer.qkv_bias, mlp_bias=ffn.bias)


def _mistral_in(config: MistralConfig) -> Blueprint:
    base = attention_in(config)
    mixer = Attention(base.heads, base.kv_heads, base.head_dim, window=config.sliding_window)
    ffn = SwiGLU(config.intermediate_size, activation=config.hidden_act)
    return blueprint_in(config, (Layer(mixer, ffn),) * config.num_hidden_layers)


def _mistral_expresses(blueprint: Blueprint) -> bool:
    mixer, ffn = blueprint.layers[0].mixer, blueprint.layers[0].ffn
    return uniform(blueprint) and not (mixer.qkv_bias or mixer.out_bias or mixer.qk_norm or ffn.bias)


def _mistral_out(blueprint: Blueprint) -> PreTrainedConfig:
    return MistralConfig(**config_facts(blueprint), sliding_window=blueprint.layers[0].mixer.window)


LLAMA = Family("llama", _llama_in, _llama_expresses, _llama_out)
MISTRAL = Family("mistral", _mistral_in, _mistral_expresses, _mistral_out)


def _ours(name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    before, _, rest = name.partition("model.layers.")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    if before or part not in _PARTS:
        raise UnsupportedModel(f"the weight {name!r} has no place in a blueprint; is this really a Llama or Qwen?")
    return f"layers.{layer}.{_PARTS[part]}.{kind}"


def _theirs(name: str) -> str:
    if name in _STOCK_OUTER:
        return _STOCK_OUTER[name]
    _, layer, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"model.layers.{layer}.{_STOCK_PARTS[part]}.{kind}"


def _thawed(value: Any) -> Any:
    return [_thawed(v) for v in value] if isinstance(value, tuple) else value
