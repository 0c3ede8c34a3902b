"""From a budget to a shape: how many layers, and how wide, so that a model has the parameters that one can afford.

Counts come from the blueprint alone. They are of *all* stored parameters, a tied head counted once. Every layer gets
the same widths, so that the result stays a stock model.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, shapes
from potstill.core.errors import InfeasibleTarget, UnsupportedModel, UsageError

DIMENSIONS = ("layers", "kv_heads", "ffn", "hidden")
STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "depth": ("layers",),
    "width": ("kv_heads", "ffn", "hidden"),
    "both": DIMENSIONS,
    "ffn": ("ffn",),
}
AUTO = "auto"
DEPTH_FROM = 0.7  # of the parameters: with so many left it is best to drop layers alone, with fewer to shrink all
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


def dimensions(strategy: str, share: float) -> tuple[str, ...]:
    """What `strategy` cuts; `auto` cuts depth alone where `share` of the parameters stays, from 0.7 on, else both.

    Source: ours, the table over share and strategy in LOG.md.
    """
    chosen = ("depth" if share >= DEPTH_FROM else "both") if strategy == AUTO else strategy
    return STRATEGIES[chosen]


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
    _require_stock(blueprint, start, () if target is None else free)
    if target is None or target == parameters(resized(blueprint, start)):
        return start
    search = _Search(blueprint, start, free, target)
    candidates = [best for step in STEPS if (best := search.best(step)) is not None]
    if not candidates:
        raise InfeasibleTarget(search.refusal())
    balance = max(search.balance(shape) for shape in candidates) - BALANCE
    return next(shape for shape in candidates if search.balance(shape) >= balance)


class _Search:
    """All shapes that differ from `start` in the dimensions `free`, and how near each comes to `target` parameters.

    Shapes are rows of a table `[N 4]` with the columns of `Shape`, since there are some 100,000 for a 7B model.
    """

    def __init__(self, blueprint: Blueprint, start: Shape, free: tuple[str, ...], target: int) -> None:
        self.start, self.free, self.target = start, free, target
        self._blueprint, self._teacher = blueprint, parameters(blueprint)
        inside = sum(_count(layer, blueprint.hidden) for layer in blueprint.layers)
        self._outside = (self._teacher - inside) // blueprint.hidden  # per coordinate: embedding, head and last norm

    def best(self, step: int) -> Shape | None:
        """The best-balanced shape within the tolerance whose widths are multiples of `step`."""
        shapes, error = self._shapes(step)
        # balance counts in hundredths, and decides before nearness
        score = error / 10 - self._balance(shapes).round(decimals=2)
        score[error > TOLERANCE] = math.inf
        if not len(score) or score.min() == math.inf:
            return None
        return _row(shapes, int(score.argmin()))

    def balance(self, shape: Shape) -> float:
        """The share that the most-cut dimension keeps."""
        return self._balance(torch.tensor([shape])).item()

    def refusal(self) -> str:
        """Why there is no shape, and which one is nearest."""
        tables = [self._shapes(step) for step in STEPS]
        shapes, error = (torch.cat(parts) for parts in zip(*tables, strict=True))
        nearest = _row(shapes, int(error.argmin()))
        count = parameters(resized(self._blueprint, nearest))
        return (
            f"no shape has {self.target:,} parameters within 2 %; the nearest has {count:,} ({nearest}): "
            f"ask for --keep {count / self._teacher:.3g} or --params {count}, or let other dimensions be cut"
        )

    def _balance(self, shapes: Int[Tensor, "N 4"]) -> Float[Tensor, " N"]:
        return (shapes.double() / torch.tensor(self.start)).amin(-1)

    def _shapes(self, step: int) -> tuple[Int[Tensor, "N 4"], Float[Tensor, " N"]]:
        """(every combination of the free sizes in steps, the distance of each to the target as a share of it)."""
        tables = [self._with_heads(kv_heads, step) for kv_heads in self._sizes("kv_heads", 1)]
        shapes, error = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return shapes, error

    def _with_heads(self, kv_heads: int, step: int) -> tuple[Int[Tensor, "N 4"], Float[Tensor, " N"]]:
        """`_shapes` of these heads; the feed-forward, where free, is solved for."""
        unit = _unit(self._blueprint, kv_heads)
        sizes = [size for size in self._sizes("hidden", math.lcm(step, unit)) if size % unit == 0]
        grid = torch.cartesian_prod(torch.tensor(self._sizes("layers", 1)), torch.tensor(sizes, dtype=torch.int64))
        layers, hidden = grid.unbind(-1)
        layer = self._blueprint.layers[0]
        # a layer's parameters are linear in hidden and in neurons: four counts give all
        (a, b), (c, d) = ([_count(_resized(layer, kv_heads, ffn), size) for ffn in (1, 2)] for size in (1, 2))
        neuron = (b - a) + (d - c - b + a) * (hidden - 1)
        fixed = a + (c - a) * (hidden - 1) - neuron
        ffn = torch.full_like(hidden, self.start.ffn)
        if "ffn" in self.free:
            ffn = self._neurons(((self.target - self._outside * hidden) / layers - fixed) / neuron, step)
        error = ((self._outside * hidden + layers * (fixed + neuron * ffn)).double() / self.target - 1).abs()
        return torch.stack([layers, torch.full_like(layers, kv_heads), ffn, hidden], -1), error

    def _sizes(self, dim: str, step: int) -> list[int]:
        whole = getattr(self.start, dim)
        if dim not in self.free:
            return [whole]
        step *= math.ceil(_stride(whole) / step)
        return sorted({*range(step, whole + 1, step), whole})

    def _neurons(self, wanted: Float[Tensor, " N"], step: int) -> Int[Tensor, " N"]:
        """The nearest widths in steps; the old width, be it round or not, counts as a step."""
        most = self.start.ffn
        step = max(step, _grain(most))
        width = (step * (wanted / step).round()).clamp(min(step, most), most)
        return torch.where(most - width < step / 2, most, width).long()


def _row(shapes: Int[Tensor, "N 4"], index: int) -> Shape:
    return Shape(*(int(size) for size in shapes[index]))


def _count(layer: Layer, hidden: int) -> int:
    return sum(math.prod(shape) for shape in layer.shapes(hidden).values())


def _resized(layer: Layer, kv_heads: int, ffn: int) -> Layer:
    queries = layer.mixer.heads // layer.mixer.kv_heads
    mixer = replace(layer.mixer, heads=queries * kv_heads, kv_heads=kv_heads)
    return replace(layer, mixer=mixer, ffn=replace(layer.ffn, width=ffn))


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


def _require_stock(blueprint: Blueprint, shape: Shape, free: tuple[str, ...]) -> None:
    unit = _unit(blueprint, shape.kv_heads)
    choices = range(1, shape.kv_heads + 1) if "kv_heads" in free else (shape.kv_heads,)
    if "hidden" not in free and all(shape.hidden % _unit(blueprint, kv_heads) for kv_heads in choices):
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
