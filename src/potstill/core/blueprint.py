"""The architecture of a network as a value, without its weights.

A `Blueprint` is frozen, hashable plain data: a stack of layers. Each layer has a mixer (how tokens see one another) and
a feed-forward, with its own widths. Hybrid stacks and pruned widths are data. `weight_shapes` computes every weight's
name and shape from the blueprint alone. Transforms map blueprints to blueprints; `models/backbone.py` builds the
network.

The kinds of mixers, feed-forwards and linear maps register themselves (`core/parts.py`); `layers/` contains the
built-in ones. `Blueprint.from_dict` knows a kind once its file is imported.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from potstill.core.depth import Depth
from potstill.core.errors import ArtifactError, UsageError
from potstill.core.parts import (
    DENSE,
    KINDS,
    Axes,
    Cost,
    Cut,
    FeedForward,
    Linear,
    Mixer,
    Part,
    Shapes,
    Sublayer,
    check_positive,
    compare_shapes,
    prefix_names,
)
from potstill.core.serialization import Facts, check_fields, freeze, thaw


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of base `theta`; `scaling` holds Hugging Face's `rope_parameters` without `rope_theta`.

    They turn the first `fraction` of the dimensions of each head, and leave the others as they are.
    """

    theta: float = 10000.0
    scaling: Facts | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise UsageError(f"rotary theta is {self.theta}; it must be positive")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"the rotary fraction is {self.fraction}; it is a share of a head, above 0 and at most 1")

    def count_rotated(self, head_dim: int) -> int:
        """The number of dimensions that turn, of a head of width `head_dim`."""
        return int(head_dim * self.fraction)

    def parameters(self) -> dict[str, Any]:
        """Hugging Face's `rope_parameters`, `{"rope_theta": ..., "rope_type": ..., ...}`."""
        scaling = {k: list(v) if isinstance(v, tuple) else v for k, v in self.scaling or ()}
        partial = {} if self.fraction == 1 else {"partial_rotary_factor": self.fraction}
        return {"rope_type": "default", **scaling, "rope_theta": self.theta, **partial}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal value; a fraction of 1 is left out."""
        data = {"theta": self.theta, "scaling": None if self.scaling is None else thaw(dict(self.scaling))}
        return data if self.fraction == 1 else data | {"fraction": self.fraction}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Rotary":
        """The value that `to_dict` wrote.

        Raises:
            ArtifactError: a key is unknown.
            UsageError: a value is out of range.
        """
        facts = check_fields(cls, data)
        return cls(**(facts | {"scaling": freeze(facts.get("scaling"))}))


@dataclass(frozen=True)
class Layer:
    """x + mixer(norm(x)), then x + ffn(norm(x)): one residual layer, normalized before each half.

    With `post_norms` the output of each half is normalized too, before it is added: x + norm(mixer(norm(x))) (Gemma).
    `linear` is the kind of linear map that both halves are made of. With a `depth` gate, tokens may skip the layer.
    """

    mixer: Mixer
    ffn: FeedForward
    post_norms: bool = False
    linear: Linear = DENSE
    depth: Depth | None = None

    @property
    def _load(self) -> float:
        return 1.0 if self.depth is None else self.depth.load

    @property
    def halves(self) -> tuple[tuple[str, Sublayer], tuple[str, Sublayer]]:
        """Both halves with the names of their modules."""
        return ("mixer", self.mixer), ("ffn", self.ffn)

    def parts(self) -> Iterator[Part]:
        """All parts of this layer, parts inside parts included."""
        gate = () if self.depth is None else self.depth.parts()
        yield from (*self.mixer.parts(), *self.ffn.parts(), *self.linear.parts(), *gate)

    def shapes(self, hidden: int) -> Shapes:
        """Name and shape of each weight of this layer in a model of width `hidden`."""
        weights: Shapes = {}
        for half, part in self.halves:
            weights[f"{half}_norm.weight"] = (hidden,)
            weights |= prefix_names(half, part.shapes(hidden, self.linear))
            weights |= {f"{half}_post_norm.weight": (hidden,)} if self.post_norms else {}
        return weights if self.depth is None else weights | prefix_names("depth", self.depth.shapes(hidden, DENSE))

    def cost(self, hidden: int, seen: float) -> Cost:
        """Multiply-adds for one token that sees `seen` tokens, itself included, in a model of width `hidden`.

        With a depth gate it is the mean over tokens: only its `load` runs, and sees as large a share of the text.
        """
        share = self._load * seen
        halves = self.mixer.cost(hidden, share, self.linear).plus(self.ffn.cost(hidden, share, self.linear))
        if self.depth is None:
            return halves
        gate = self.depth.cost(hidden, seen, DENSE)
        return gate.plus(Cost(self._load * halves.matrices, self._load * halves.seen))

    def state_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes of this layer's state after a text of `tokens` tokens, in a dtype of `itemsize` bytes."""
        return self.mixer.state_bytes(round(self._load * tokens), itemsize)

    def cuts(self) -> dict[str, Cut]:
        """The widths of both halves that can be cut, by name; `measured_at` counts from the layer."""
        return {
            name: replace(cut, measured_at=tuple(f"{half}.{module}" for module in cut.measured_at))
            for half, part in self.halves
            for name, cut in part.cuts().items()
        }

    def resize(self, sizes: Mapping[str, int]) -> "Layer":
        """The same layer with other sizes of its cuts.

        Raises:
            UsageError: this layer has no cut of that name.
        """
        if unknown := sorted(set(sizes) - set(self.cuts())):
            raise UsageError(f"a layer of {self.describe()} has no {', '.join(unknown)} to cut")
        changed: dict[str, Any] = {}
        for half, part in self.halves:
            half_sizes = {name: size for name, size in sizes.items() if name in part.cuts()}
            changed |= {half: part.resize(half_sizes)} if half_sizes else {}
        return replace(self, **changed)

    def describe(self) -> str:
        """The kinds of both halves, for messages: `attention and swiglu`."""
        gate = "" if self.depth is None else " behind a depth gate"
        return f"{self.mixer.kind_name} and {self.ffn.kind_name}{gate}"

    def norm_names(self) -> tuple[str, ...]:
        """The names of the norms that are as wide as the model."""
        return ("mixer_norm", "ffn_norm", *(("mixer_post_norm", "ffn_post_norm") if self.post_norms else ()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal layer; plain linear maps and no gate are left out."""
        data = {"mixer": _encode(self.mixer), "ffn": _encode(self.ffn), "post_norms": self.post_norms}
        data |= {} if self.linear == DENSE else {"linear": _encode(self.linear)}
        return data if self.depth is None else data | {"depth": _encode(self.depth)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Layer":
        """The layer that `to_dict` wrote.

        Raises:
            ArtifactError: a key is unknown or missing, a kind is not registered, or a part is in the wrong place.
        """
        roles: Mapping[str, type[Part]] = {"mixer": Mixer, "ffn": FeedForward, "linear": Linear, "depth": Depth}
        facts = check_fields(cls, data)
        for name, role in roles.items():
            if name in facts:
                facts[name] = _decode_part(facts[name], role)
        return cls(**facts)


@dataclass(frozen=True)
class Blueprint:
    """A causal language model of width `hidden` over `vocabulary` tokens, trained for `context` positions.

    `tied` models share embedding and head and have no `head.weight`. The network multiplies embeddings by
    `embedding_scale`, rounded to their dtype. With `zero_centred_norms` every norm multiplies by 1 + weight; with
    `logit_softcap` c, logits z become c tanh(z / c). `extras` are facts that change no number: token ids, the range of
    initial weights, the family of the original model. With them a stock config round-trips.
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
        check_positive(vocabulary=self.vocabulary, hidden=self.hidden, context=self.context)
        if not self.layers:
            raise UsageError("a blueprint without layers is no network; keep at least one")
        if self.norm_eps <= 0:
            raise UsageError(f"norm_eps is {self.norm_eps}; it must be positive")
        for name, value in (("embedding_scale", self.embedding_scale), ("logit_softcap", self.logit_softcap)):
            if value is not None and value <= 0:
                raise UsageError(f"{name} is {value}; it must be positive")

    def change_layers(self, is_selected: Callable[[int], bool], change: Callable[[Layer], Layer]) -> "Blueprint":
        """The same blueprint with `change` applied to every layer whose index `is_selected`."""
        layers = (change(layer) if is_selected(i) else layer for i, layer in enumerate(self.layers))
        return replace(self, layers=tuple(layers))

    @property
    def trainable_form(self) -> "Blueprint":
        """The same function with every matrix stored as it multiplies; itself where nothing is packed."""
        layers = (replace(layer, linear=layer.linear.trainable_form) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def kinds(self) -> frozenset[type[Part]]:
        """The kinds of all parts in it."""
        return frozenset(type(part) for layer in set(self.layers) for part in layer.parts())

    def reports(self) -> frozenset[str]:
        """The names of what its parts report in a forward pass."""
        parts = (part for layer in set(self.layers) for part in layer.parts())
        return frozenset(name for part in parts if isinstance(part, Sublayer) for name in part.reports)

    def get_extra(self, name: str, default: Any = None) -> Any:
        """The fact called `name`, or `default`."""
        return dict(self.extras).get(name, default)

    def update_extras(self, facts: Mapping[str, Any]) -> "Blueprint":
        """The same blueprint with `facts` added to its extras; a fact of the same name is replaced."""
        return replace(self, extras=freeze(dict(self.extras) | dict(facts)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, from which `from_dict` makes an equal blueprint."""
        layers = [layer.to_dict() for layer in self.layers]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"layers": layers, "rotary": self.rotary.to_dict(), "extras": dict(self.extras)}
        plain: dict[str, Any] = thaw(values)
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Blueprint":
        """The blueprint that `to_dict` wrote.

        Raises:
            ArtifactError: a key is unknown or missing, or the kind of a part is not registered.
            UsageError: a value is out of range.
        """
        facts = check_fields(cls, data)
        layers = tuple(Layer.from_dict(entry) for entry in facts["layers"])
        rotary, extras = Rotary.from_dict(facts.get("rotary", {})), freeze(facts.get("extras", {}))
        return cls(**(facts | {"layers": layers, "rotary": rotary, "extras": extras}))


def weight_shapes(blueprint: Blueprint) -> Shapes:
    """Name and shape of every stored weight, from the blueprint alone; a tied head has no weight."""
    weights: Shapes = {"embed.weight": (blueprint.vocabulary, blueprint.hidden)}
    for i, layer in enumerate(blueprint.layers):
        weights |= prefix_names(f"layers.{i}", layer.shapes(blueprint.hidden))
    weights["norm.weight"] = (blueprint.hidden,)
    return weights if blueprint.tied else weights | {"head.weight": (blueprint.vocabulary, blueprint.hidden)}


@lru_cache(maxsize=256)
def find_cut_axes(layer: Layer, name: str, hidden: int) -> Axes:
    """The rows and columns of each weight that a unit of the cut `name` of a layer owns."""
    larger = layer.resize({name: layer.cuts()[name].size + 1})
    return compare_shapes(layer.shapes(hidden), larger.shapes(hidden))


def _encode(value: Any) -> Any:
    """A fact as JSON data: a part with its kind, a tuple as a list, anything else unchanged."""
    if isinstance(value, Part):
        return {"kind": value.kind_name, **{f.name: _encode(getattr(value, f.name)) for f in fields(value)}}  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value.to_dict() if isinstance(value, Rotary) else value


def _decode(value: Any) -> Any:
    """The fact that `_encode` wrote."""
    if isinstance(value, Mapping):
        return _decode_part(value, Part) if "kind" in value else Rotary.from_dict(value)
    return tuple(_decode(item) for item in value) if isinstance(value, list | tuple) else value


def _decode_part(data: Mapping[str, Any], role: type[Part]) -> Any:
    kind = data.get("kind")
    names = sorted(name for name, part_class in KINDS.items() if issubclass(part_class, role))
    if not isinstance(kind, str):
        raise ArtifactError(
            f"a {role.__name__} in a blueprint has no kind; registered are {', '.join(names) or 'none'}"
        )
    if kind not in names:
        raise ArtifactError(
            f"unknown kind {kind!r} of {role.__name__} in a blueprint; registered are {', '.join(names) or 'none'}. "
            f"Import the file that registers it by @kind({kind!r}) first"
        )
    part_class = KINDS[kind]
    facts = check_fields(part_class, {k: v for k, v in data.items() if k != "kind"})
    return part_class(**{name: _decode(value) for name, value in facts.items()})
