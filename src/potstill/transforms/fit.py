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

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import InfeasibleTarget, UnsupportedModel, UsageError

DIMENSIONS = ("layers", "kv_heads", "ffn", "hidden")
STRATEGIES: Mapping[str, tuple[str, ...]] = {
    "depth": ("layers",),
    "width": ("kv_heads", "ffn", "hidden"),
    "both": DIMENSIONS,
    "ffn": ("ffn",),
}
AUTO = "auto"
DEPTH_ONLY_SHARE = 0.7  # of the parameters: with so many left it is best to drop layers alone, with fewer to shrink all
TOLERANCE = 0.02  # of the target
WIDTH_STEPS = (64, 32, 16, 8, 4, 2, 1)  # roundest first: kernels and block-quantised files like multiples of 32
BALANCE_MARGIN = 0.05  # how much of the most-cut dimension's share is given up for rounder widths


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


def count_parameters(blueprint: Blueprint) -> int:
    """The number of stored parameters; a tied head is counted once."""
    return sum(math.prod(shape) for shape in weight_shapes(blueprint).values())


def get_dimensions(strategy: str, share: float) -> tuple[str, ...]:
    """What `strategy` cuts; `auto` cuts depth alone where `share` of the parameters stays, from 0.7 on, else both.

    Source: ours, the table over share and strategy in LOG.md.
    """
    strategy_name = ("depth" if share >= DEPTH_ONLY_SHARE else "both") if strategy == AUTO else strategy
    return STRATEGIES[strategy_name]


def get_shape(blueprint: Blueprint) -> Shape:
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


def resize_blueprint(blueprint: Blueprint, shape: Shape) -> Blueprint:
    """A blueprint of that shape, made of the first layers: which ones really stay is the business of `DropLayers`."""
    layers = tuple(_resize_layer(layer, shape.kv_heads, shape.ffn) for layer in blueprint.layers[: shape.layers])
    return replace(blueprint, layers=layers, hidden=shape.hidden)


def fit_shape(
    blueprint: Blueprint,
    *,
    keep: float | None = None,
    params: int | None = None,
    dims: tuple[str, ...] = DIMENSIONS,
    exact_sizes: Mapping[str, int] | None = None,
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
    exact_sizes = dict(exact_sizes or {})
    old_shape = get_shape(blueprint)
    _check_dimensions(dims, exact_sizes, old_shape)
    target = _compute_target(blueprint, keep, params)
    free_dims = tuple(dim for dim in DIMENSIONS if dim in dims and dim not in exact_sizes)
    start_shape = old_shape._replace(**exact_sizes)
    _check_stock_shape(blueprint, start_shape, () if target is None else free_dims)
    if target is None or target == count_parameters(resize_blueprint(blueprint, start_shape)):
        return start_shape
    search = _ShapeSearch(blueprint, start_shape, free_dims, target)
    candidates = [shape_at_step for step in WIDTH_STEPS if (shape_at_step := search.find_best(step)) is not None]
    if not candidates:
        raise InfeasibleTarget(search.explain_failure())
    balance = max(search.compute_balance(shape) for shape in candidates) - BALANCE_MARGIN
    return next(shape for shape in candidates if search.compute_balance(shape) >= balance)


class _ShapeSearch:
    """All shapes that differ from `start` in the dimensions `free`, and how near each comes to `target` parameters.

    Shapes are rows of a table `[N 4]` with the columns of `Shape`, since there are some 100,000 for a 7B model.
    """

    def __init__(self, blueprint: Blueprint, start_shape: Shape, free_dims: tuple[str, ...], target: int) -> None:
        self.start_shape, self.free_dims, self.target = start_shape, free_dims, target
        self._blueprint, self._num_parameters = blueprint, count_parameters(blueprint)
        layer_parameters = sum(_count_layer_parameters(layer, blueprint.hidden) for layer in blueprint.layers)
        self._outer_parameters = (
            self._num_parameters - layer_parameters
        ) // blueprint.hidden  # per coordinate: embedding, head and last norm

    def find_best(self, step: int) -> Shape | None:
        """The best-balanced shape within the tolerance whose widths are multiples of `step`."""
        shapes, error = self._enumerate_shapes(step)
        # balance counts in hundredths, and decides before nearness
        score = error / 10 - self._compute_balances(shapes).round(decimals=2)
        score[error > TOLERANCE] = math.inf
        if not len(score) or score.min() == math.inf:
            return None
        return _make_shape(shapes, int(score.argmin()))

    def compute_balance(self, shape: Shape) -> float:
        """The share that the most-cut dimension keeps."""
        return self._compute_balances(torch.tensor([shape])).item()

    def explain_failure(self) -> str:
        """Why there is no shape, and which one is nearest."""
        tables = [self._enumerate_shapes(step) for step in WIDTH_STEPS]
        shapes, error = (torch.cat(parts) for parts in zip(*tables, strict=True))
        nearest_shape = _make_shape(shapes, int(error.argmin()))
        count = count_parameters(resize_blueprint(self._blueprint, nearest_shape))
        return (
            f"no shape has {self.target:,} parameters within 2 %; the nearest has {count:,} ({nearest_shape}): "
            f"ask for --keep {count / self._num_parameters:.3g} or --params {count}, or let other dimensions be cut"
        )

    def _compute_balances(self, shapes: Int[Tensor, "N 4"]) -> Float[Tensor, " N"]:
        return (shapes.double() / torch.tensor(self.start_shape)).amin(-1)

    def _enumerate_shapes(self, step: int) -> tuple[Int[Tensor, "N 4"], Float[Tensor, " N"]]:
        """(every combination of the free sizes in steps, the distance of each to the target as a share of it)."""
        tables = [self._enumerate_with_heads(kv_heads, step) for kv_heads in self._list_sizes("kv_heads", 1)]
        shapes, error = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return shapes, error

    def _enumerate_with_heads(self, kv_heads: int, step: int) -> tuple[Int[Tensor, "N 4"], Float[Tensor, " N"]]:
        """`_shapes` of these heads; the feed-forward, where free, is solved for."""
        multiple = _get_hidden_multiple(self._blueprint, kv_heads)
        sizes = [size for size in self._list_sizes("hidden", math.lcm(step, multiple)) if size % multiple == 0]
        grid = torch.cartesian_prod(torch.tensor(self._list_sizes("layers", 1)), torch.tensor(sizes, dtype=torch.int64))
        layers, hidden = grid.unbind(-1)
        layer = self._blueprint.layers[0]
        # a layer's parameters are linear in hidden and in neurons: four counts give all
        (a, b), (c, d) = (
            [_count_layer_parameters(_resize_layer(layer, kv_heads, ffn), size) for ffn in (1, 2)] for size in (1, 2)
        )
        neuron = (b - a) + (d - c - b + a) * (hidden - 1)
        constant = a + (c - a) * (hidden - 1) - neuron
        ffn = torch.full_like(hidden, self.start_shape.ffn)
        if "ffn" in self.free_dims:
            ffn = self._solve_neurons(
                ((self.target - self._outer_parameters * hidden) / layers - constant) / neuron, step
            )
        error = (
            (self._outer_parameters * hidden + layers * (constant + neuron * ffn)).double() / self.target - 1
        ).abs()
        return torch.stack([layers, torch.full_like(layers, kv_heads), ffn, hidden], -1), error

    def _list_sizes(self, dim: str, step: int) -> list[int]:
        max_size = getattr(self.start_shape, dim)
        if dim not in self.free_dims:
            return [max_size]
        step *= math.ceil(_compute_stride(max_size) / step)
        return sorted({*range(step, max_size + 1, step), max_size})

    def _solve_neurons(self, exact_width: Float[Tensor, " N"], step: int) -> Int[Tensor, " N"]:
        """The nearest widths in steps; the old width, be it round or not, counts as a step."""
        max_width = self.start_shape.ffn
        step = max(step, _compute_grain(max_width))
        width = (step * (exact_width / step).round()).clamp(min(step, max_width), max_width)
        return torch.where(max_width - width < step / 2, max_width, width).long()


def _make_shape(shapes: Int[Tensor, "N 4"], index: int) -> Shape:
    return Shape(*(int(size) for size in shapes[index]))


def _count_layer_parameters(layer: Layer, hidden: int) -> int:
    return sum(math.prod(shape) for shape in layer.shapes(hidden).values())


def _resize_layer(layer: Layer, kv_heads: int, ffn: int) -> Layer:
    queries_per_group = layer.mixer.heads // layer.mixer.kv_heads
    mixer = replace(layer.mixer, heads=queries_per_group * kv_heads, kv_heads=kv_heads)
    return replace(layer, mixer=mixer, ffn=replace(layer.ffn, width=ffn))


def _get_hidden_multiple(blueprint: Blueprint, kv_heads: int) -> int:
    """What the hidden size must be a multiple of: transformers opens no Llama config where that is not its heads."""
    mixer = blueprint.layers[0].mixer
    return 1 if blueprint.hidden % mixer.heads else mixer.heads // mixer.kv_heads * kv_heads


def _compute_grain(width: int) -> int:
    """The largest power of two, to 64, below a hundredth of `width`: rounding to it costs less than 0.5 %."""
    return 1 << min(6, max(0, (width // 100).bit_length() - 1))


def _compute_stride(size: int) -> int:
    """The finest step that leaves at most some 128 sizes to try: 1 up to 128, 8 for 1,024."""
    return 1 << max(0, math.ceil(math.log2(size / 128)))


def _compute_target(blueprint: Blueprint, keep: float | None, params: int | None) -> int | None:
    num_parameters = count_parameters(blueprint)
    if keep is not None and params is not None:
        raise UsageError(f"--keep {keep} and --params {params} both set the size; give one of them")
    if keep is not None:
        if not 0 < keep <= 1:
            raise UsageError(f"--keep {keep} must be above 0 and at most 1: the share of parameters that stays")
        return max(1, round(keep * num_parameters))
    if params is not None and params < 1:
        raise UsageError(f"--params {params} must be at least 1")
    if params is not None and params > num_parameters:
        raise InfeasibleTarget(
            f"--params {params:,} is more than the teacher's {num_parameters:,}; ask for at most that many"
        )
    return params


def _check_stock_shape(blueprint: Blueprint, shape: Shape, free_dims: tuple[str, ...]) -> None:
    multiple = _get_hidden_multiple(blueprint, shape.kv_heads)
    choices = range(1, shape.kv_heads + 1) if "kv_heads" in free_dims else (shape.kv_heads,)
    if "hidden" not in free_dims and all(
        shape.hidden % _get_hidden_multiple(blueprint, kv_heads) for kv_heads in choices
    ):
        raise InfeasibleTarget(
            f"hidden {shape.hidden} is no multiple of {multiple} heads, and no stock Llama opens without; "
            f"ask for hidden {max(multiple, shape.hidden // multiple * multiple)}"
        )


def _check_dimensions(dims: tuple[str, ...], exact_sizes: Mapping[str, int], old_shape: Shape) -> None:
    for dim in (*dims, *exact_sizes):
        if dim not in DIMENSIONS:
            raise UsageError(f"{dim!r} is no dimension that can be cut; those are {', '.join(DIMENSIONS)}")
    for dim, size in exact_sizes.items():
        if size < 1:
            raise UsageError(f"{dim} {size} must be at least 1")
        if size > getattr(old_shape, dim):
            raise InfeasibleTarget(
                f"{dim} {size} is more than the teacher's {getattr(old_shape, dim)}; ask for at most that"
            )
