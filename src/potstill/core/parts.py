"""The parts of a layer as values: mixers, feed-forwards and linear maps, and the registry of their kinds.

Each kind is one file. It contains the facts, a frozen dataclass under `@kind("name")`, and the module that computes the
part, under `layers.registry.builds`. No other file lists the kinds: all code reads sizes, costs and cuts from the
facts.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

from potstill.core.errors import UsageError

Shapes = dict[str, tuple[int, ...]]
Axes = dict[str, list[tuple[int, int]]]  # of each weight: (axis, entries along it for each unit)

KINDS: "dict[str, type[Part]]" = {}

PartType = TypeVar("PartType", bound="type[Part]")


def kind(name: str) -> Callable[[PartType], PartType]:
    """Registers a class of facts as the kind `name`; blueprints store that name.

    Raises:
        UsageError: another class already has that name.
    """

    def register(facts: PartType) -> PartType:
        registered = KINDS.get(name, facts)
        if (registered.__module__, registered.__qualname__) != (facts.__module__, facts.__qualname__):
            raise UsageError(f"the kind {name!r} is registered by {registered.__module__}; choose another name")
        facts.kind_name = name
        KINDS[name] = facts
        return facts

    return register


class Part:
    """A value that describes one part of a network. Its fields are plain values, `Rotary`, parts, or tuples of them."""

    kind_name: ClassVar[str] = ""

    @classmethod
    def examples(cls) -> "tuple[Part, ...]":
        """Small values of this kind, on which the tests of all kinds run."""
        return ()

    def parts(self) -> "Iterator[Part]":
        """This part and every part inside it."""
        yield self
        for field in fields(self):  # type: ignore[arg-type]  # every kind is a dataclass
            value = getattr(self, field.name)
            for inner in value if isinstance(value, tuple) else (value,):
                if isinstance(inner, Part):
                    yield from inner.parts()


@kind("dense")
@dataclass(frozen=True)
class Linear(Part):
    """A linear map W x + b with one matrix W. Other kinds of linear map derive from it.

    With `has_exact_cuts`, a map without some of its inputs or outputs is the same map in the others.
    """

    has_exact_cuts: ClassVar[bool] = True

    @classmethod
    def examples(cls) -> "tuple[Linear, ...]":
        """One value."""
        return (cls(),)

    @property
    def trainable_form(self) -> "Linear":
        """The kind of the same map whose matrix is stored as it multiplies; a kind that packs numbers says another."""
        return self

    def shapes(self, inputs: int, outputs: int, *, bias: bool = False) -> Shapes:
        """Name and shape of each weight of a map from `inputs` to `outputs` numbers."""
        weight: Shapes = {"weight": (outputs, inputs)}
        return weight | {"bias": (outputs,)} if bias else weight


DENSE = Linear()


class Cost(NamedTuple):
    """Multiply-adds for one token: `matrices` with weights, `seen` over the tokens that it sees or the memory of them.

    Weights that this token does not use, such as those of other experts, do not count.
    """

    matrices: float
    seen: float

    def plus(self, other: "Cost") -> "Cost":
        """The cost of both."""
        return Cost(self.matrices + other.matrices, self.seen + other.seen)


@dataclass(frozen=True)
class Cut:
    """A width that pruning can cut: `size` units, each with equally many neighboring rows or columns of some weights.

    `measured_at` names the modules that read the output of the units, in their order; `importance` measures the units
    there. If the model's width is a multiple of `size * hidden_multiple`, it remains one; 0 sets no such rule.
    """

    size: int
    measured_at: tuple[str, ...]
    hidden_multiple: int = 0


class Sublayer(Part):
    """One half of a layer, or its gate. `reports` names the tensors that its module passes to `Positions.report`."""

    reports: ClassVar[tuple[str, ...]] = ()

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Name and shape of each weight in a model of width `hidden`, in the order of the module's state dict."""
        raise NotImplementedError

    def cost(self, hidden: int, seen: float, linear: Linear) -> Cost:
        """Multiply-adds for one token that sees `seen` tokens, itself included; by default it uses each matrix once."""
        shapes = self.shapes(hidden, linear.trainable_form).values()
        return Cost(float(sum(math.prod(shape) for shape in shapes if len(shape) > 1)), 0.0)

    def cuts(self) -> Mapping[str, Cut]:
        """The widths that can be cut, by name."""
        return {}

    def resize(self, sizes: Mapping[str, int]) -> "Sublayer":
        """The same part with other sizes of its cuts.

        Raises:
            UsageError: it has no cut of that name.
        """
        raise UsageError(f"{type(self).__name__} has no width to cut, so not {', '.join(sizes)}")


class Mixer(Sublayer):
    """The half of a layer that mixes tokens. Its module is `(x, positions, state) -> (y, state)`."""

    def state_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes that the state of a text of `tokens` tokens takes, if numbers of the model's dtype take `itemsize`.

        Raises:
            NotImplementedError: the kind does not say it.
        """
        raise NotImplementedError

    def projection_widths(self) -> Mapping[str, int]:
        """Numbers per token of the `queries`, `keys` and `values`, where the mixer has such projections."""
        return {}


class FeedForward(Sublayer):
    """The half of a layer that processes each token separately. Its module is `(x, positions) -> y`."""


def prefix_names(prefix: str, shapes: Shapes) -> Shapes:
    """The same shapes under the names `prefix.name`."""
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def compare_shapes(old: Shapes, larger: Shapes) -> Axes:
    """The axes along which each weight grows, with the number of entries that it grows by.

    Raises:
        UsageError: the two do not have the same weights.
    """
    if old.keys() != larger.keys():
        raise UsageError(f"a cut may not add or remove weights: {sorted(old.keys() ^ larger.keys())}")
    grown = {name: enumerate(zip(shape, larger[name], strict=True)) for name, shape in old.items()}
    return {name: [(axis, b - a) for axis, (a, b) in sizes if a != b] for name, sizes in grown.items()}


def check_positive(**sizes: Any) -> None:
    """Raises UsageError for a size that is not a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"{name} is {size!r}; it must be a whole number of at least 1")
