"""From a budget to a shape: the number of layers and the widths of a model with a given number of parameters.

Counts come from the blueprint alone. They are of *all* stored parameters, those of every expert included, a tied head
counted once. Every layer gets the same widths, so that the result stays a stock model.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import InfeasibleTarget, UnsupportedModel, UsageError

STRATEGIES = ("depth", "width", "both", "ffn")
AUTO = "auto"
DEPTH_ONLY_SHARE = 0.7  # of the parameters: with so many left it is best to drop layers alone, with fewer to shrink all
TOLERANCE = 0.02  # of the target
WIDTH_STEPS = (64, 32, 16, 8, 4, 2, 1)  # roundest first: kernels and block-quantised files like multiples of 32
BALANCE_MARGIN = 0.05  # how much of the most-cut dimension's share is given up for rounder widths


class Shape(dict[str, int]):
    """Sizes of a model whose layers are alike, by name: `layers`, the cuts of a layer, `hidden`.

    The cuts are those that its parts declare: for Llama `kv_heads` (with all their queries) and `ffn`.
    """

    def __str__(self) -> str:
        return ", ".join(f"{self[name]} layers" if name == "layers" else f"{name} {self[name]}" for name in self)

    def change(self, sizes: Mapping[str, int]) -> "Shape":
        """The same shape with other `sizes`."""
        return Shape({**self, **sizes})


def count_parameters(blueprint: Blueprint) -> int:
    """The number of stored parameters; a tied head is counted once."""
    return sum(math.prod(shape) for shape in weight_shapes(blueprint).values())


def get_dimensions(blueprint: Blueprint, strategy: str, share: float) -> tuple[str, ...]:
    """The dimensions that `strategy` cuts: `layers`, all widths, both, or the widths of the feed-forward.

    `auto` is `depth` where a `share` of at least 0.7 of the parameters stays, else `both`.
    Source: ours, the table over share and strategy in LOG.md.
    """
    strategy_name = ("depth" if share >= DEPTH_ONLY_SHARE else "both") if strategy == AUTO else strategy
    cuts, ffn_cuts = tuple(blueprint.layers[0].cuts()), tuple(blueprint.layers[0].ffn.cuts())
    widths = (*cuts, "hidden")
    return {"depth": ("layers",), "width": widths, "both": ("layers", *widths), "ffn": ffn_cuts}[strategy_name]


def get_shape(blueprint: Blueprint) -> Shape:
    """The shape of a blueprint whose layers are alike.

    Raises:
        UnsupportedModel: its layers are of several kinds, or differ in their widths or weights.
    """
    kinds = sorted({layer.describe() for layer in blueprint.layers})
    if len(kinds) > 1:
        raise UnsupportedModel(
            f"this model's layers are of {len(kinds)} kinds ({'; '.join(kinds)}), "
            f"and one shape fits layers of one kind; choose layers by DropLayers and widths by Narrow"
        )
    widths = {tuple((name, cut.size) for name, cut in layer.cuts().items()) for layer in blueprint.layers}
    if len(widths) > 1:
        raise UnsupportedModel(
            f"this model's layers have {len(widths)} different widths; give the shape layer by layer, through Narrow"
        )
    if len({tuple(layer.shapes(blueprint.hidden).items()) for layer in blueprint.layers}) > 1:
        raise UnsupportedModel("this model's layers differ in their weights; give the shape layer by layer, by Narrow")
    (sizes,) = widths
    return Shape(layers=len(blueprint.layers), **dict(sizes), hidden=blueprint.hidden)


def resize_blueprint(blueprint: Blueprint, shape: Shape) -> Blueprint:
    """A blueprint of that shape, made of the first layers; `DropLayers` decides which layers really stay."""
    layers = tuple(_resize_layer(layer, shape) for layer in blueprint.layers[: shape["layers"]])
    return replace(blueprint, layers=layers, hidden=shape["hidden"])


def fit_shape(
    blueprint: Blueprint,
    *,
    keep: float | None = None,
    params: int | None = None,
    dims: tuple[str, ...] | None = None,
    exact_sizes: Mapping[str, int] | None = None,
) -> Shape:
    """The shape with a share `keep` of the parameters (or `params` of them), within 2 %, cut only in `dims`.

    Of all such shapes, it is the one whose most-cut dimension keeps the largest share. So all dimensions keep about
    the same share, as in MiniMA-3B (arXiv:2311.07052: 0.75 of hidden size, heads, feed-forward and layers). Where
    key/value heads are too few to follow, they stay whole. For width alone, with matrices of hidden x width, the share
    is sqrt(keep), MiniMA's 1 - sqrt(1 - s) of each dimension at sparsity s, corrected for the embeddings, of which only
    one side is cut. Widths are the roundest that keep this balance, the hidden size a multiple of the heads.
    `exact_sizes` sets sizes by name; without `keep` and `params`, those and the old sizes are the shape. `keep=1`
    changes nothing. `dims` are all dimensions by default.

    Raises:
        UsageError: `keep` is outside (0, 1]; a name is no dimension; `keep` and `params` are both given.
        InfeasibleTarget: the target is larger than the model, no shape comes within 2 % (the message names the
            nearest), or exact sizes make no stock model.
        UnsupportedModel: the model's layers are not alike.
    """
    exact_sizes, old_shape = dict(exact_sizes or {}), get_shape(blueprint)
    dims = tuple(old_shape) if dims is None else dims
    _check_dimensions(dims, exact_sizes, old_shape)
    target = _compute_target(blueprint, keep, params)
    free_dims = tuple(dim for dim in old_shape if dim in dims and dim not in exact_sizes)
    start_shape = old_shape.change(exact_sizes)
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
    """All shapes that differ from `start_shape` in the dimensions `free_dims`, and how near each comes to `target`.

    Shapes are rows of a table `[N S]` with one column for each size of `Shape`, since there are some 100,000 for a 7B
    model. Every combination of sizes is tried, except that the last cut of a layer (the feed-forward) is solved for.
    """

    def __init__(self, blueprint: Blueprint, start_shape: Shape, free_dims: tuple[str, ...], target: int) -> None:
        self.start_shape, self.free_dims, self.target = start_shape, free_dims, target
        self._blueprint, self._num_parameters = blueprint, count_parameters(blueprint)
        layer_parameters = sum(_count_layer_parameters(layer, blueprint.hidden) for layer in blueprint.layers)
        self._outer_parameters = (
            self._num_parameters - layer_parameters
        ) // blueprint.hidden  # per coordinate: embedding, head and last norm
        *self._listed_cuts, self._solved_cut = list(blueprint.layers[0].cuts()) or [""]

    def find_best(self, step: int) -> Shape | None:
        """The best-balanced shape within the tolerance whose widths are multiples of `step`."""
        shapes, error = self._enumerate_shapes(step)
        # balance counts in hundredths, and decides before nearness
        score = error / 10 - self._compute_balances(shapes).round(decimals=2)
        score[error > TOLERANCE] = math.inf
        if not len(score) or score.min() == math.inf:
            return None
        shape = self._make_shape(shapes, int(score.argmin()))
        count = count_parameters(resize_blueprint(self._blueprint, shape))
        if abs(count / self.target - 1) > 1.01 * TOLERANCE:
            layer = self._blueprint.layers[0].describe()
            raise UnsupportedModel(f"the parameters of {layer} are not linear in its widths; give all sizes exactly")
        return shape

    def compute_balance(self, shape: Shape) -> float:
        """The share that the most-cut dimension keeps."""
        return self._compute_balances(torch.tensor([list(shape.values())])).item()

    def explain_failure(self) -> str:
        """Why there is no shape, and which one is nearest."""
        tables = [self._enumerate_shapes(step) for step in WIDTH_STEPS]
        shapes, error = (torch.cat(parts) for parts in zip(*tables, strict=True))
        nearest_shape = self._make_shape(shapes, int(error.argmin()))
        count = count_parameters(resize_blueprint(self._blueprint, nearest_shape))
        return (
            f"no shape has {self.target:,} parameters within 2 %; the nearest has {count:,} ({nearest_shape}): "
            f"ask for --keep {count / self._num_parameters:.3g} or --params {count}, or let other dimensions be cut"
        )

    def _make_shape(self, shapes: Int[Tensor, "N S"], index: int) -> Shape:
        return Shape(zip(self.start_shape, map(int, shapes[index]), strict=True))

    def _compute_balances(self, shapes: Int[Tensor, "N S"]) -> Float[Tensor, " N"]:
        return (shapes.double() / torch.tensor(list(self.start_shape.values()))).amin(-1)

    def _enumerate_shapes(self, step: int) -> tuple[Int[Tensor, "N S"], Float[Tensor, " N"]]:
        """(every combination of the free sizes in steps, the distance of each to the target as a share of it)."""
        choices = product(*(self._list_sizes(name, 1) for name in self._listed_cuts))
        tables = [self._enumerate_with(dict(zip(self._listed_cuts, sizes, strict=True)), step) for sizes in choices]
        shapes, error = (torch.cat(parts) for parts in zip(*tables, strict=True))
        return shapes, error

    def _enumerate_with(self, sizes: dict[str, int], step: int) -> tuple[Int[Tensor, "N S"], Float[Tensor, " N"]]:
        """`_enumerate_shapes` with these sizes of all cuts but the last, which is solved for where it is free."""
        multiple = _get_hidden_multiple(self._blueprint, {**self.start_shape, **sizes})
        hidden_step = math.lcm(step, multiple)
        hidden_sizes = [size for size in self._list_sizes("hidden", hidden_step) if size % multiple == 0]
        layer_sizes = torch.tensor(self._list_sizes("layers", 1))
        layers, hidden = torch.cartesian_prod(layer_sizes, torch.tensor(hidden_sizes, dtype=torch.int64)).unbind(-1)
        constant, neuron = self._count_linear(sizes, hidden)
        solved = torch.full_like(hidden, self.start_shape.get(self._solved_cut, 1))
        if self._solved_cut in self.free_dims:
            solved = self._solve(((self.target - self._outer_parameters * hidden) / layers - constant) / neuron, step)
        parameters = self._outer_parameters * hidden + layers * (constant + neuron * solved)
        columns = {name: torch.full_like(layers, size) for name, size in sizes.items()}
        columns |= {"layers": layers, "hidden": hidden, self._solved_cut: solved}
        shapes = torch.stack([columns[name] for name in self.start_shape], -1)
        return shapes, (parameters.double() / self.target - 1).abs()

    def _count_linear(self, sizes: dict[str, int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(parameters of a layer without units of the last cut, parameters of each such unit), at each hidden size.

        They are linear in the hidden size and in the units, so four counts are enough.
        """
        layer = self._blueprint.layers[0]

        def count(units: int, size: int) -> int:
            last = {self._solved_cut: units} if self._solved_cut else {}
            return _count_layer_parameters(_resize_layer(layer, {**self.start_shape, **sizes, **last}), size)

        (a, b), (c, d) = ([count(units, size) for units in (1, 2)] for size in (1, 2))
        neuron = (b - a) + (d - c - b + a) * (hidden - 1)
        return a + (c - a) * (hidden - 1) - neuron, neuron

    def _list_sizes(self, dim: str, step: int) -> list[int]:
        max_size = self.start_shape[dim]
        if dim not in self.free_dims:
            return [max_size]
        step *= math.ceil(_compute_stride(max_size) / step)
        return sorted({*range(step, max_size + 1, step), max_size})

    def _solve(self, exact_width: Float[Tensor, " N"], step: int) -> Int[Tensor, " N"]:
        """The nearest widths in steps; the old width, be it round or not, counts as a step."""
        max_width = self.start_shape[self._solved_cut]
        step = max(step, _compute_grain(max_width))
        width = (step * (exact_width / step).round()).clamp(min(step, max_width), max_width)
        return torch.where(max_width - width < step / 2, max_width, width).long()


def _count_layer_parameters(layer: Layer, hidden: int) -> int:
    return sum(math.prod(shape) for shape in layer.shapes(hidden).values())


def _resize_layer(layer: Layer, sizes: Mapping[str, int]) -> Layer:
    return layer.resize({name: sizes[name] for name in layer.cuts()})


def _get_hidden_multiple(blueprint: Blueprint, sizes: Mapping[str, int]) -> int:
    """The number that the hidden size must be a multiple of: transformers opens no Llama config without that."""
    cuts = {name: cut for name, cut in blueprint.layers[0].cuts().items() if cut.hidden_multiple}
    bound = [name for name, cut in cuts.items() if blueprint.hidden % (cut.hidden_multiple * cut.size) == 0]
    return math.lcm(1, *(cuts[name].hidden_multiple * sizes[name] for name in bound))


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
            raise UsageError(f"--keep {keep} must be above 0 and at most 1: the share of the parameters to keep")
        return max(1, round(keep * num_parameters))
    if params is not None and params < 1:
        raise UsageError(f"--params {params} must be at least 1")
    if params is not None and params > num_parameters:
        raise InfeasibleTarget(
            f"--params {params:,} is more than the teacher's {num_parameters:,}; ask for at most that many"
        )
    return params


def _check_stock_shape(blueprint: Blueprint, shape: Shape, free_dims: tuple[str, ...]) -> None:
    hidden, multiple = shape["hidden"], _get_hidden_multiple(blueprint, shape)
    free = [name for name, cut in blueprint.layers[0].cuts().items() if cut.hidden_multiple and name in free_dims]
    choices = product(*(range(1, shape[name] + 1) for name in free))
    shapes = (shape.change(dict(zip(free, sizes, strict=True))) for sizes in choices)
    if "hidden" not in free_dims and all(hidden % _get_hidden_multiple(blueprint, choice) for choice in shapes):
        raise InfeasibleTarget(
            f"hidden {hidden} is no multiple of {multiple} heads, which a stock Llama needs; "
            f"ask for hidden {max(multiple, hidden // multiple * multiple)}"
        )


def _check_dimensions(dims: tuple[str, ...], exact_sizes: Mapping[str, int], old_shape: Shape) -> None:
    for dim in (*dims, *exact_sizes):
        if dim not in old_shape:
            raise UsageError(f"{dim!r} is no dimension that can be cut; those are {', '.join(old_shape)}")
    for dim, size in exact_sizes.items():
        if size < 1:
            raise UsageError(f"{dim} {size} must be at least 1")
        if size > old_shape[dim]:
            raise InfeasibleTarget(f"{dim} {size} is more than the teacher's {old_shape[dim]}; ask for at most that")
