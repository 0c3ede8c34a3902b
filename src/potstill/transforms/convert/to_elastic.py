"""Nested sizes in one set of weights: each size has some of the layers, and the first heads and neurons of each.

On Elastic Language Models (arXiv:2311.07204) switches between sizes of one model as the load changes. A share s of the
parameters of the layers leaves, with D dimensions to cut, s^(1/D) of each (MiniMA's 1 - sqrt(1 - sparsity) for two):

    depth  s of the layers, at full width              the paper's choice
    width  s of the heads and neurons of every layer
    both   sqrt(s) of the layers, sqrt(s) of the heads and neurons

Layers go by measured harm: each size is chosen from the layers of the size before it, so sizes are nested. Heads and
neurons are sorted by importance within their layer (MiniMA's code), which changes no function, so sizes are prefixes.
Harm is measured on the first batch of the text, about 2,048 tokens, and importance on all of it. The width of the
residual stream stays whole: norms would need the statistics of the part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

from potstill.core.blueprint import Blueprint, find_cut_axes
from potstill.core.elastic import SIZES, Size, format_share, read_sizes
from potstill.core.errors import UsageError
from potstill.core.options import Option
from potstill.core.parts import Cut
from potstill.core.types import Batch, Weights
from potstill.models.backbone import Backbone
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.conversion import Conversion, register_conversion
from potstill.transforms.drop_layers import DropLayers, ablate_layers
from potstill.transforms.importance import ImportanceScores, measure_importance, next_token_loss
from potstill.transforms.narrow import Indices, select_entries

DIMENSIONS = {"depth": 1, "width": 1, "both": 2}
GRAIN = 8  # rows of a matrix are removed in multiples of it


@dataclass(frozen=True, kw_only=True)
class SortUnits:
    """Puts the units of each cut of layer l into the order `units[name][l]`; the function stays the same.

    `sizes` become a fact of the blueprint. None stands for a layer without that cut.
    """

    units: Mapping[str, tuple[Indices | None, ...]]
    sizes: tuple[Size, ...]

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same layers, with the sizes."""
        return old.update_extras({SIZES: [size.to_dict() for size in self.sizes]})

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The same rows and columns in another order."""
        new = dict(weights)
        for name, orders in self.units.items():
            for i, order in enumerate(orders):
                if order is not None:
                    axes = find_cut_axes(old.layers[i], name, old.hidden)
                    select_entries(new, axes, order, prefix=f"layers.{i}.")
        return new


@register_conversion("elastic", help="nested sizes that share one set of weights; distill trains all of them")
@dataclass(frozen=True, kw_only=True)
class ToElastic(Conversion):
    """Gives a model smaller sizes. The model itself, its largest size, keeps its function."""

    reads_text: ClassVar[bool] = True

    shares: str = Option(
        "1-0.75-0.5-0.25", "Shares of the layers' parameters that the sizes have, from 1 down."
    ).field()
    dims: str = Option("depth", "What smaller sizes have less of: depth, width, or both.").field()

    def __post_init__(self) -> None:
        if self.dims not in DIMENSIONS:
            raise UsageError(f"elastic: there are no dims {self.dims!r}; choose one of {', '.join(DIMENSIONS)}")
        _ = self.size_shares

    @cached_property
    def size_shares(self) -> tuple[float, ...]:
        """The shares as numbers. Raises: UsageError."""
        try:
            shares = tuple(float(share) for share in self.shares.split("-"))
        except ValueError as error:
            raise UsageError(f"elastic: {self.shares!r} is no list of shares such as 1-0.5-0.25") from error
        is_descending = all(a > b > 0 for a, b in pairwise(shares))
        if len(shares) < 2 or shares[0] != 1 or not is_descending:
            raise UsageError(f"elastic: the shares {self.shares} must begin with 1, go down, and be at least two")
        return shares

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same layers with the sizes, which name the first layers; `convert` chooses them by their harm.

        Raises:
            UsageError: the model has sizes already, or two shares give one size.
        """
        if read_sizes(old):
            raise UsageError("the model has sizes already; convert the original model")
        sizes = tuple(self._make_size(share, old) for share in self.size_shares)
        for larger, smaller in pairwise(sizes):
            if (larger.layers, larger.units) == (smaller.layers, smaller.units):
                names = f"{format_share(larger.share)} and {format_share(smaller.share)}"
                raise UsageError(f"the shares {names} give one size of this model; give fewer, or other dims")
        return SortUnits(units={}, sizes=sizes).blueprint(old)

    def convert(self, model: Backbone, batches: Sequence[Batch]) -> tuple[Backbone, dict[str, Any]]:
        """The model with its units sorted by importance, and the sizes; `batches` are calibration text.

        Raises:
            UsageError: as `blueprint` does.
            DataError: there is no text, or the loss is not finite on it.
        """
        sizes = read_sizes(self.blueprint(model.blueprint))
        if self.dims != "width":
            sizes = _choose_layers(model, batches[:1], sizes)
        units = {} if self.dims == "depth" else _rank_units(measure_importance(model, batches, next_token_loss))
        layers = {format_share(size.share): list(size.layers) for size in sizes}
        return apply_transform(SortUnits(units=units, sizes=sizes), model), {"layers_of_sizes": layers}

    def _make_size(self, share: float, old: Blueprint) -> Size:
        part = compute_dimension_share(share, self.dims)
        layers = range(len(old.layers) if self.dims == "width" else max(1, round(part * len(old.layers))))
        units = {} if self.dims == "depth" else _count_units(part, old)
        return Size(share, tuple(layers), tuple(sorted(units.items())))


def compute_dimension_share(share: float, dims: str) -> float:
    """The share of each dimension that is cut, so that a share of the parameters remains."""
    return share ** (1 / DIMENSIONS[dims])


def round_to_grain(rows: float) -> int:
    """The multiple of `GRAIN` that is next to `rows`; of two, the one that is even times `GRAIN`."""
    return GRAIN * round(rows / GRAIN)


def _count_units(share: float, old: Blueprint) -> dict[str, int]:
    """The units of each cut that a share leaves. Raises: UsageError for a cut that differs between layers."""
    units: dict[str, int] = {}
    for layer in dict.fromkeys(old.layers):
        for name, cut in layer.cuts().items():
            rows = min(entries for axes in find_cut_axes(layer, name, old.hidden).values() for _, entries in axes)
            size = _count_cut_units(share, cut, rows, old.hidden)
            if units.setdefault(name, size) != size:
                raise UsageError(f"the layers of this model have {name} of several widths; choose dims=depth")
    return units


def _count_cut_units(share: float, cut: Cut, rows: int, hidden: int) -> int:
    """The size of a cut, `rows` rows to a unit, that is next to a share of it, and that a stock config allows."""
    removed = round(round_to_grain((1 - share) * cut.size * rows) / rows)
    bound = cut.hidden_multiple and hidden % (cut.size * cut.hidden_multiple) == 0
    allowed = [n for n in range(1, cut.size + 1) if not bound or hidden % (n * cut.hidden_multiple) == 0]
    return min(allowed, key=lambda n: (abs(n - (cut.size - removed)), -n))


def _choose_layers(model: Backbone, batches: Sequence[Batch], sizes: Sequence[Size]) -> tuple[Size, ...]:
    """The sizes with the layers that hurt most to lose, each measured in the network of the size before it."""
    network, layers, chosen = model, tuple(range(len(model.layers))), []
    for size in sizes:
        if len(size.layers) < len(layers):
            harm = ablate_layers(network, batches, next_token_loss, len(size.layers), greedy=False)
            layers, network = tuple(layers[i] for i in harm.keep), apply_transform(DropLayers(harm.keep), network)
        chosen.append(replace(size, layers=layers))
    return tuple(chosen)


def _rank_units(scores: ImportanceScores) -> dict[str, tuple[Indices | None, ...]]:
    """The units of each cut in each layer, the most important first."""
    return {
        name: tuple(
            None if layer is None else tuple(layer.argsort(descending=True, stable=True).tolist()) for layer in layers
        )
        for name, layers in scores.units.items()
    }
