"""From a budget to a shape: how many layers, and how wide, so that a model has the parameters that one can afford.

Counts come from the blueprint alone. They are of *all* stored parameters, a tied head counted once. Every layer gets
the same widths, so that the result stays a stock model.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from typing import NamedTuple

from potstill.core.blueprint import Blueprint, Layer, shapes
from potstill.core.errors import InfeasibleTarget, UnsupportedModel, UsageError

DIMENSIONS = ("layers", "kv_heads", "ffn", "hidden")
STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "depth": ("layers",),
    "width": ("kv_heads", "ffn", "hidden"),
    "both": DIMENSIONS,
    "ffn": ("ffn",),
}
TOLERANCE = 0.02  # of the target
STEPS = (64, 32, 16, 8, 4, 2, 1)  # roundest first: kernels and block-quantised files like multiples of 32
BALANCE = 0.05  # how much of the most-cut dimension's share is given up for rounder widths


class Shape(NamedTuple):
    """Sizes of a model whose layers are alike; queries per key/value head and the width of a head are never cut."""

    layers: int
    kv_heads: int
    ffn: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, feed-forward {self.ffn}, {self.kv_heads} key/value heads"

    def to_dict(self) -> dict[str, int]:
        """The sizes by name, for a card."""
        return self._asdict()


def parameters(blueprint: Blueprint) -> int:
    """The number of stored parameters; a tied head is counted once."""
    return sum(math.prod(shape) for shape in shapes(blueprint).values())


def shape_of(blueprint: Blueprint) -> Shape:
    """The shape of a blueprint whose layers are alike.

    Raises:
        UnsupportedModel: its layers differ in width.
    """
    widths = {(layer.mixer.kv_heads, layer.ffn.width) for layer in blueprint.layers}
    if len(widths) > 1:
        raise UnsupportedModel(
            f"this model's layers have {len(widths)} different widths; give the shape layer by layer, through Narrow"
        )
    ((kv_heads, ffn),) = widths
    return Shape(len(blueprint.layers), kv_heads, ffn, blueprint.hidden)


def resized(blueprint: Blueprint, shape: Shape) -> Blueprint:
    """A blueprint of that shape, made of the first layers: which ones really stay is the business of `DropLayers`."""
    layers = tuple(_resized(layer, shape.kv_heads, shape.ffn) for layer in blueprint.layers[: shape.layers])
    return replace(blueprint, layers=layers, hidden=shape.hidden)


def fit(
    blueprint: Blueprint,
    *,
    keep: float | None = None,
    params: int | None = None,
    dims: tuple[str, ...] = DIMENSIONS,
    exact: Mapping[str, int] | None = None,
) -> Shape:
    """The shape with a share `keep` of the parameters (or `params` of them), reached within 2 %, cut in `dims` alone.

    Of all shapes that do, it is the one whose most-cut dimension keeps the largest share. So all dimensions keep about
    the same share, as in MiniMA-3B (arXiv:2311.07052: 0.75 of hidden size, heads, feed-forward and layers), and where
    key/value heads are too few to follow, they stay whole. For width alone, with matrices of hidden x width, the share
    is sqrt(keep), MiniMA's 1 - sqrt(1 - s) of each dimension at sparsity s, corrected for the embeddings, of which one
    side alone is cut. Widths are the roundest that keep this balance, the hidden size a multiple of the heads. `exact`
    sets sizes by name; without `keep` and `params`, it and the old sizes are the shape. `keep=1` changes nothing.

    Raises:
        UsageError: `keep` is outside (0, 1]; a name is no dimension; `keep` and `params` are both given.
        InfeasibleTarget: the target is larger than the model, no shape comes within 2 % (the nearest one is named), or
            explicit sizes make no stock model.
        UnsupportedModel: the model's layers differ in width.
    """
    exact = dict(exact or {})
    old = shape_of(blueprint)
    _require_dimensions(dims, exact, old)
    target = _target(blueprint, keep, params)
    free = tuple(dim for dim in DIMENSIONS if dim in dims and dim not in exact)
    start = old._replace(**exact)
    if not {"kv_heads", "hidden"} & {*free} or target is None:
        _require_stock(blueprint, start)
    if target is None or target == parameters(resized(blueprint, start)):
        return start
    search = _Search(blueprint, start, free, target)
    candidates = [best for step in STEPS if (best := search.best(step)) is not None]
    if not candidates:
        raise InfeasibleTarget(search.refusal())
    balance = max(search.balance(shape) for shape in candidates) - BALANCE
    return next(shape for shape in candidates if search.balance(shape) >= balance)


class _Search:
    """All shapes that differ from `start` in the dimensions `free`, and how near each comes to `target` parameters."""

    def __init__(self, blueprint: Blueprint, start: Shape, free: tuple[str, ...], target: int) -> None:
        self.start, self.free, self.target = start, free, target
        self.teacher = parameters(blueprint)
        self._blueprint = blueprint
        self._outside = _affine_in_hidden(blueprint)
        self._inside = cache(self._count_inside)

    def count(self, shape: Shape) -> int:
        """Parameters of `shape`."""
        fixed, per_neuron = self._inside(shape.kv_heads, shape.hidden)
        return self._outside * shape.hidden + shape.layers * (fixed + per_neuron * shape.ffn)

    def error(self, shape: Shape) -> float:
        """Distance to the target, as a share of it."""
        return abs(self.count(shape) / self.target - 1)

    def balance(self, shape: Shape) -> float:
        """The share that the most-cut dimension keeps."""
        return min(new / old for new, old in zip(shape, self.start, strict=True))

    def best(self, step: int) -> Shape | None:
        """The best-balanced shape within the tolerance whose widths are multiples of `step`."""
        near = (shape for shape in self.shapes(step) if self.error(shape) <= TOLERANCE)
        return min(near, key=lambda shape: (-round(self.balance(shape), 2), self.error(shape)), default=None)

    def shapes(self, step: int) -> Iterator[Shape]:
        """Every combination of the free sizes in steps; the feed-forward, where free, is solved for."""
        solve = "ffn" in self.free
        for layers, kv_heads in product(self._sizes("layers", 1), self._sizes("kv_heads", 1)):
            unit = _unit(self._blueprint, kv_heads)
            for hidden in self._sizes("hidden", math.lcm(step, unit)):
                if hidden % unit == 0:
                    ffn = self._neurons(layers, kv_heads, hidden, step=step) if solve else self.start.ffn
                    yield Shape(layers, kv_heads, ffn, hidden)

    def refusal(self) -> str:
        """Why there is no shape, and which one is nearest."""
        nearest = min((shape for step in STEPS for shape in self.shapes(step)), key=self.error)
        count = self.count(nearest)
        return (
            f"no shape has {self.target:,} parameters within 2 %; the nearest has {count:,} ({nearest}): "
            f"ask for --keep {count / self.teacher:.3g} or --params {count}, or let other dimensions be cut"
        )

    def _sizes(self, dim: str, step: int) -> list[int]:
        whole = getattr(self.start, dim)
        if dim not in self.free:
            return [whole]
        step *= math.ceil(_stride(whole) / step)
        return sorted({*range(step, whole + 1, step), whole})

    def _neurons(self, layers: int, kv_heads: int, hidden: int, *, step: int) -> int:
        """The width in steps that comes nearest to the target; the old width, be it round or not, counts as a step."""
        step = max(step, _grain(self.start.ffn))
        fixed, per_neuron = self._inside(kv_heads, hidden)
        left = (self.target - self._outside * hidden) / layers - fixed
        most = self.start.ffn
        width = step * round(left / per_neuron / step)
        return most if width > most or most - width < step / 2 else max(width, min(step, most))

    def _count_inside(self, kv_heads: int, hidden: int) -> tuple[int, int]:
        """(parameters of a layer without neurons, parameters of one more neuron)."""
        one, two = (_count(_resized(self._blueprint.layers[0], kv_heads, ffn), hidden) for ffn in (1, 2))
        return 2 * one - two, two - one


def _affine_in_hidden(blueprint: Blueprint) -> int:
    """Parameters outside the layers for each hidden coordinate: embedding, head and the last norm."""
    inside = sum(_count(layer, blueprint.hidden) for layer in blueprint.layers)
    return (parameters(blueprint) - inside) // blueprint.hidden


def _count(layer: Layer, hidden: int) -> int:
    return sum(math.prod(shape) for shape in layer.shapes(hidden).values())


def _resized(layer: Layer, kv_heads: int, ffn: int) -> Layer:
    queries = layer.mixer.heads // layer.mixer.kv_heads
    mixer = replace(layer.mixer, heads=queries * kv_heads, kv_heads=kv_heads)
    return Layer(mixer, replace(layer.ffn, width=ffn))


def _unit(blueprint: Blueprint, kv_heads: int) -> int:
    """What the hidden size must be a multiple of: transformers opens no Llama config where that is not its heads."""
    mixer = blueprint.layers[0].mixer
    return 1 if blueprint.hidden % mixer.heads else mixer.heads // mixer.kv_heads * kv_heads


def _grain(width: int) -> int:
    """The largest power of two, to 64, below a hundredth of `width`: rounding to it costs less than 0.5 %."""
    return 1 << min(6, max(0, (width // 100).bit_length() - 1))


def _stride(whole: int) -> int:
    """The finest step that leaves at most some 128 sizes to try: 1 up to 128, 8 for 1,024."""
    return 1 << max(0, math.ceil(math.log2(whole / 128)))


def _target(blueprint: Blueprint, keep: float | None, params: int | None) -> int | None:
    whole = parameters(blueprint)
    if keep is not None and params is not None:
        raise UsageError(f"--keep {keep} and --params {params} both set the size; give one of them")
    if keep is not None:
        if not 0 < keep <= 1:
            raise UsageError(f"--keep {keep} must be above 0 and at most 1: the share of parameters that stays")
        return max(1, round(keep * whole))
    if params is not None and params < 1:
        raise UsageError(f"--params {params} must be at least 1")
    if params is not None and params > whole:
        raise InfeasibleTarget(f"--params {params:,} is more than the teacher's {whole:,}; ask for at most that many")
    return params


def _require_stock(blueprint: Blueprint, shape: Shape) -> None:
    unit = _unit(blueprint, shape.kv_heads)
    if shape.hidden % unit:
        raise InfeasibleTarget(
            f"hidden {shape.hidden} is no multiple of {unit} heads, and no stock Llama opens without; "
            f"ask for hidden {max(unit, shape.hidden // unit * unit)}"
        )


def _require_dimensions(dims: tuple[str, ...], exact: Mapping[str, int], old: Shape) -> None:
    for dim in (*dims, *exact):
        if dim not in DIMENSIONS:
            raise UsageError(f"{dim!r} is no dimension that can be cut; those are {', '.join(DIMENSIONS)}")
    for dim, size in exact.items():
        if size < 1:
            raise UsageError(f"{dim} {size} must be at least 1")
        if size > getattr(old, dim):
            raise InfeasibleTarget(f"{dim} {size} is more than the teacher's {getattr(old, dim)}; ask for at most that")
