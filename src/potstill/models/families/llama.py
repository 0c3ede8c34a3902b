"""Llama and Mistral: which blueprints they express, their configs, and the names of their weights, both ways.

Qwen spells its weights in the same way (`families/qwen.py`), so the map of names is shared from here; Gemma adds to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from potstill.core.blueprint import Attention, Blueprint, Layer, Rotary, SwiGLU
from potstill.core.errors import UnsupportedModel
from potstill.core.plain import frozen, thawed
from potstill.core.types import Weights

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTER = {EMBED: "embed.weight", "model.norm.weight": "norm.weight", HEAD: "head.weight"}
PARTS = {
    "input_layernorm": "mixer_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"mixer.{x}" for x in "qkvo"},
    **{f"self_attn.{x}_norm": f"mixer.{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn.{x}" for x in ("gate", "up", "down")},
}
_STOCK_OUTER = {ours: theirs for theirs, ours in _OUTER.items()}

KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")  # facts that change no number


@dataclass(frozen=True)
class Family:
    """A stock architecture: how its config reads as a blueprint, which blueprints it expresses, and as what config.

    `parts` are the names of a layer's parts and what they are called here.
    """

    name: str
    read: Callable[[Any], Blueprint]
    expresses: Callable[[Blueprint], bool]
    config_out: Callable[[Blueprint], PreTrainedConfig]
    parts: Mapping[str, str] = field(default_factory=lambda: PARTS)


def weights_in(state: Mapping[str, Tensor], parts: Mapping[str, str], *, tied: bool) -> Weights:
    """A stock state dict under our names; the head that a tied model lists twice is left out.

    Raises:
        UnsupportedModel: a weight has no place in a blueprint.
    """
    return {_ours(name, parts): weight for name, weight in state.items() if not (tied and name == HEAD)}


def weights_out(weights: Weights, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Our weights under the stock names; a tied model gets its head spelled out, as stock state dicts have it."""
    stock = {ours: theirs for theirs, ours in parts.items()}
    state = {_theirs(name, stock): weight for name, weight in weights.items()}
    return state if HEAD in state else state | {HEAD: state[EMBED]}


def rotary_in(rope_parameters: Mapping[str, Any]) -> Rotary:
    """The rotary positions that a stock config calls `rope_parameters`.

    Raises:
        UnsupportedModel: they differ by layer, or turn a part of each head only.
    """
    parameters = dict(rope_parameters)
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModel(
            f"rope_parameters {parameters} differ by layer; one rotation for all layers is supported"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        factor = parameters["partial_rotary_factor"]
        raise UnsupportedModel(f"partial_rotary_factor {factor} is not supported; the whole head must turn")
    theta = float(parameters.pop("rope_theta"))
    return Rotary(theta, None if parameters == {"rope_type": "default"} else frozen(parameters))


def blueprint_in(
    config: PreTrainedConfig, layers: tuple[Layer, ...], *extras: str, rotary: Rotary | None = None
) -> Blueprint:
    """What every family of this shape says in the same words; `extras` names further facts to keep.

    `rotary` is for a family whose `rope_parameters` say more than one.

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
        rotary=rotary or rotary_in(config.rope_parameters),
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
    facts |= {name: thawed(known[name]) for name in (*KEPT, *extras) if name in known}
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


def plain(blueprint: Blueprint) -> bool:
    """Nothing of what Llama and its like cannot say: two norms a layer, one rotation, and no scale or cap anywhere."""
    outer = blueprint.embedding_scale == 1 and blueprint.logit_softcap is None and not blueprint.zero_centred_norms
    bare = (not layer.post_norms and layer.mixer.scale is None for layer in blueprint.layers)
    return outer and all(bare) and all(layer.mixer.rotary is None for layer in blueprint.layers)


def layer_types(blueprint: Blueprint) -> list[str]:
    """What Hugging Face calls each layer's attention."""
    windows = (layer.mixer.window for layer in blueprint.layers)
    return ["full_attention" if window is None else "sliding_attention" for window in windows]


def _llama_in(config: LlamaConfig) -> Blueprint:
    bias = config.attention_bias
    base = attention_in(config)
    mixer = Attention(base.heads, base.kv_heads, base.head_dim, qkv_bias=bias, out_bias=bias)
    ffn = SwiGLU(config.intermediate_size, config.mlp_bias, config.hidden_act)
    return blueprint_in(config, (Layer(mixer, ffn),) * config.num_hidden_layers, "pretraining_tp")


def _llama_expresses(blueprint: Blueprint) -> bool:
    mixer = blueprint.layers[0].mixer
    bare = mixer.qkv_bias == mixer.out_bias and not mixer.qk_norm and mixer.window is None
    divides = blueprint.hidden % mixer.heads == 0  # its config insists on that
    return plain(blueprint) and uniform(blueprint) and bare and divides


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
    return (
        plain(blueprint) and uniform(blueprint) and not (mixer.qkv_bias or mixer.out_bias or mixer.qk_norm or ffn.bias)
    )


def _mistral_out(blueprint: Blueprint) -> PreTrainedConfig:
    return MistralConfig(**config_facts(blueprint), sliding_window=blueprint.layers[0].mixer.window)


LLAMA = Family("llama", _llama_in, _llama_expresses, _llama_out)
MISTRAL = Family("mistral", _mistral_in, _mistral_expresses, _mistral_out)


def _ours(name: str, parts: Mapping[str, str]) -> str:
    if name in _OUTER:
        return _OUTER[name]
    before, _, rest = name.partition("model.layers.")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    if before or part not in parts:
        raise UnsupportedModel(
            f"the weight {name!r} has no place in a blueprint; is the model_type in its config right?"
        )
    return f"layers.{layer}.{parts[part]}.{kind}"


def _theirs(name: str, parts: Mapping[str, str]) -> str:
    if name in _STOCK_OUTER:
        return _STOCK_OUTER[name]
    _, layer, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"model.layers.{layer}.{parts[part]}.{kind}"
