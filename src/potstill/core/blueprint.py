"""An architecture as a value: everything that a network is, apart from its weights.

A `Blueprint` is frozen, hashable and plain data: a stack of layers, each a mixer (how tokens see one another) and a
feed-forward, with its own widths. Hybrid stacks and pruned widths are data, and `shapes` tells every weight's name and
shape from the value alone. Transforms map blueprints to blueprints; `models/backbone.py` builds the network.

A new kind of mixer or feed-forward is one dataclass here (its facts, its `shapes`) with an entry in `MIXERS` or `FFNS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from potstill.core.errors import ArtifactError, UsageError
from potstill.core.serialization import Facts, check_fields, freeze, thaw

Shapes = dict[str, tuple[int, ...]]


def _linear_shapes(name: str, outputs: int, inputs: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (outputs, inputs)}
    return weight | {f"{name}.bias": (outputs,)} if bias else weight


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"{name} is {size!r}; it must be a whole number of at least 1")


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of base `theta`; `scaling` holds Hugging Face's `rope_parameters` apart from `rope_theta`."""

    theta: float = 10000.0
    scaling: Facts | None = None

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise UsageError(f"rotary theta is {self.theta}; it must be positive")

    def parameters(self) -> dict[str, Any]:
        """The same facts in Hugging Face's spelling, `{"rope_theta": ..., "rope_type": ..., ...}`."""
        scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in self.scaling or ()}
        return {"rope_type": "default", **scaling, "rope_theta": self.theta}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal value."""
        return {"theta": self.theta, "scaling": None if self.scaling is None else thaw(dict(self.scaling))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Rotary":
        """What `to_dict` wrote. Raises: ArtefactError where a key is unknown, UsageError where a value is."""
        facts = check_fields(cls, data)
        return cls(**(facts | {"scaling": freeze(facts.get("scaling"))}))


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention with rotary positions: `heads` queries share `kv_heads` keys and values.

    `qk_norm` normalises each head's queries and keys before the rotation (Qwen3). A query sees itself and the
    `window - 1` tokens before it; `None` is the whole document. `scale` is what q k^T is multiplied by, where it is not
    1 / sqrt(head_dim), and `rotary` are positions that differ from the model's own (Gemma 3 has both).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    scale: float | None = None
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        _check_positive(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        if self.heads % self.kv_heads:
            raise UsageError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise UsageError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions")
        if self.window is not None:
            _check_positive(window=self.window)
        if self.scale is not None and self.scale <= 0:
            raise UsageError(f"the scale of attention is {self.scale}; it must be positive")

    @property
    def softmax_scale(self) -> float:
        """What q k^T is multiplied by before the softmax."""
        return float(self.head_dim**-0.5) if self.scale is None else self.scale

    def shapes(self, hidden: int) -> Shapes:
        """Name and shape of each weight of this mixer in a model of width `hidden`."""
        query_width, key_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = _linear_shapes("q", query_width, hidden, self.qkv_bias)
        weights |= _linear_shapes("k", key_width, hidden, self.qkv_bias) | _linear_shapes(
            "v", key_width, hidden, self.qkv_bias
        )
        weights |= _linear_shapes("o", hidden, query_width, self.out_bias)
        norms: Shapes = {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return weights | norms if self.qk_norm else weights


@dataclass(frozen=True)
class SwiGLU:
    """down(activation(gate x) * up x), of `width` neurons; with another activation than silu it is its GLU cousin."""

    width: int
    bias: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        _check_positive(width=self.width)

    def shapes(self, hidden: int) -> Shapes:
        """Name and shape of each weight of this feed-forward in a model of width `hidden`."""
        weights = _linear_shapes("gate", self.width, hidden, self.bias) | _linear_shapes(
            "up", self.width, hidden, self.bias
        )
        return weights | _linear_shapes("down", hidden, self.width, self.bias)


Mixer = Attention
FFN = SwiGLU
MIXERS: dict[str, type[Mixer]] = {"attention": Attention}
FFNS: dict[str, type[FFN]] = {"swiglu": SwiGLU}


@dataclass(frozen=True)
class Layer:
    """x + mixer(norm(x)), then x + ffn(norm(x)): one residual layer, normalised before each half.

    With `post_norms` what each half says is normalised too, before it is added: x + norm(mixer(norm(x))) (Gemma).
    """

    mixer: Mixer
    ffn: FFN
    post_norms: bool = False

    def shapes(self, hidden: int) -> Shapes:
        """Name and shape of each weight of this layer in a model of width `hidden`."""
        weights: Shapes = {}
        for half, part in (("mixer", self.mixer), ("ffn", self.ffn)):
            weights[f"{half}_norm.weight"] = (hidden,)
            weights |= {f"{half}.{name}": shape for name, shape in part.shapes(hidden).items()}
            weights |= {f"{half}_post_norm.weight": (hidden,)} if self.post_norms else {}
        return weights

    def norm_names(self) -> tuple[str, ...]:
        """The names of the norms that are as wide as the model."""
        return ("mixer_norm", "ffn_norm", *(("mixer_post_norm", "ffn_post_norm") if self.post_norms else ()))


@dataclass(frozen=True)
class Blueprint:
    """A causal language model of width `hidden` over `vocabulary` tokens, trained for `context` positions.

    `tied` models share embedding and head and have no `head.weight`. Embeddings are multiplied by `embedding_scale`,
    rounded to their dtype. With `zero_centred_norms` every norm multiplies by 1 + weight; with `logit_softcap` c,
    logits z become c tanh(z / c). `extras` are facts that change no number (token ids, the range of initial weights,
    the family it was read from): they make a stock config round-trip.
    """

    vocabulary: int
    hidden: int
    layers: tuple[Layer, ...]
    norm_eps: float = 1e-5
    rotary: Rotary = Rotary()
    tied: bool = False
    context: int = 2048
    embedding_scale: float = 1.0
    zero_centred_norms: bool = False
    logit_softcap: float | None = None
    extras: Facts = ()

    def __post_init__(self) -> None:
        _check_positive(vocabulary=self.vocabulary, hidden=self.hidden, context=self.context)
        if not self.layers:
            raise UsageError("a blueprint without layers is no network; keep at least one")
        if self.norm_eps <= 0:
            raise UsageError(f"norm_eps is {self.norm_eps}; it must be positive")
        for name, value in (("embedding_scale", self.embedding_scale), ("logit_softcap", self.logit_softcap)):
            if value is not None and value <= 0:
                raise UsageError(f"{name} is {value}; it must be positive")

    def change_layers(self, is_selected: Callable[[int], bool], change: Callable[[Layer], Layer]) -> "Blueprint":
        """The same blueprint with `change` applied to every layer whose index `where` holds for."""
        layers = (change(layer) if is_selected(i) else layer for i, layer in enumerate(self.layers))
        return replace(self, layers=tuple(layers))

    def get_extra(self, name: str, default: Any = None) -> Any:
        """The fact called `name`, or `default`."""
        return dict(self.extras).get(name, default)

    def update_extras(self, facts: Mapping[str, Any]) -> "Blueprint":
        """The same blueprint with `facts` added to, or put in place of, its extras."""
        return replace(self, extras=freeze(dict(self.extras) | dict(facts)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal blueprint."""
        layers = [_layer_to_dict(layer) for layer in self.layers]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"layers": layers, "rotary": self.rotary.to_dict(), "extras": dict(self.extras)}
        plain: dict[str, Any] = thaw(values)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Blueprint":
        """The blueprint that `to_dict` wrote.

        Raises:
            ArtefactError: a key is unknown or missing; a kind of mixer or feed-forward is unknown.
            UsageError: a value is out of range.
        """
        facts = check_fields(cls, data)
        layers = tuple(_layer_from_dict(entry) for entry in facts["layers"])
        rotary, extras = Rotary.from_dict(facts.get("rotary", {})), freeze(facts.get("extras", {}))
        return cls(**(facts | {"layers": layers, "rotary": rotary, "extras": extras}))


def weight_shapes(blueprint: Blueprint) -> Shapes:
    """Name and shape of every stored weight, from the value alone; a tied head is no weight of its own."""
    weights: Shapes = {"embed.weight": (blueprint.vocabulary, blueprint.hidden)}
    for i, layer in enumerate(blueprint.layers):
        weights |= {f"layers.{i}.{name}": shape for name, shape in layer.shapes(blueprint.hidden).items()}
    weights["norm.weight"] = (blueprint.hidden,)
    return weights if blueprint.tied else weights | {"head.weight": (blueprint.vocabulary, blueprint.hidden)}


def _part_to_dict(part: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    kind = next(name for name, part_class in kinds.items() if type(part) is part_class)
    facts = {f.name: getattr(part, f.name) for f in fields(part)}
    return {"kind": kind, **{k: v.to_dict() if isinstance(v, Rotary) else v for k, v in facts.items()}}


def _part_from_dict(data: Mapping[str, Any], kinds: Mapping[str, type]) -> Any:
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ArtifactError(f"unknown kind {kind!r} in a blueprint; this version knows {', '.join(kinds)}")
    part_class = kinds[kind]
    facts = check_fields(part_class, {k: v for k, v in data.items() if k != "kind"})
    return part_class(**{k: Rotary.from_dict(v) if isinstance(v, Mapping) else v for k, v in facts.items()})


def _layer_to_dict(layer: Layer) -> dict[str, Any]:
    parts = {"mixer": _part_to_dict(layer.mixer, MIXERS), "ffn": _part_to_dict(layer.ffn, FFNS)}
    return {**parts, "post_norms": layer.post_norms}


def _layer_from_dict(data: Mapping[str, Any]) -> Layer:
    facts = check_fields(Layer, data)
    parts = {"mixer": _part_from_dict(facts["mixer"], MIXERS), "ffn": _part_from_dict(facts["ffn"], FFNS)}
    return Layer(**(facts | parts))
