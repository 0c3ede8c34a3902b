"""The sizes of an elastic model: nested parts of one set of weights (On Elastic Language Models, arXiv:2311.07204).

A size has some of the layers, and in them the first units of each cut (heads, neurons). Every smaller size is a part of
each larger one, so that the weights of the largest are those of all. The sizes are a fact among a blueprint's extras,
which changes no number: the model itself is its largest size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, find_cut_axes
from potstill.core.errors import ArtifactError, UsageError
from potstill.core.serialization import Facts
from potstill.core.types import Weights

STUDENT = "student"  # the network that is trained; `student@0.5` is a size of it
SIZES = "potstill_sizes"  # the name of the fact, also in `config.json`


@dataclass(frozen=True)
class Size:
    """One size: the `layers` of the model, and the first `units` of each named cut in them; a cut without a name is
    whole.

    `share` is the name of the size, such as 0.5. A `Size` is a transform: two pure functions, of a blueprint and of its
    weights.
    """

    share: float
    layers: tuple[int, ...]
    units: Facts = ()

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The architecture of this size, which has no sizes itself."""
        layers = tuple(old.layers[i].resize(self._list_units(old.layers[i])) for i in self.layers)
        extras = tuple((name, fact) for name, fact in old.extras if name != SIZES)
        return replace(old, layers=layers, extras=extras)

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """Views of the first rows and columns of each weight. They share memory with `weights`, and gradients flow."""
        new = {name: weight for name, weight in weights.items() if not name.startswith("layers.")}
        for position, i in enumerate(self.layers):
            layer = old.layers[i]
            layer_weights = {name: weights[f"layers.{i}.{name}"] for name in layer.shapes(old.hidden)}
            for cut, size in self._list_units(layer).items():
                for name, axes in find_cut_axes(layer, cut, old.hidden).items():
                    layer_weights[name] = _keep_first(layer_weights[name], axes, size)
            new |= {f"layers.{position}.{name}": weight for name, weight in layer_weights.items()}
        return new

    def is_whole(self, blueprint: Blueprint) -> bool:
        """Whether this is all of a model with that blueprint."""
        cuts = [layer.cuts() for layer in blueprint.layers]
        has_all_units = all(
            any(name in names for names in cuts) and all(names[name].size == n for names in cuts if name in names)
            for name, n in self.units
        )
        return self.layers == tuple(range(len(blueprint.layers))) and has_all_units

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"share": self.share, "layers": list(self.layers), "units": dict(self.units)}

    def _list_units(self, layer: Layer) -> dict[str, int]:
        """The units of each cut of a layer that is smaller in this size."""
        cuts = layer.cuts()
        return {name: size for name, size in self.units if name in cuts and size < cuts[name].size}


def read_sizes(blueprint: Blueprint) -> tuple[Size, ...]:
    """The sizes of an elastic model, the largest first; none of any other model.

    A model that was pruned after it got its sizes is no elastic model any more, because they describe another shape.

    Raises:
        ArtifactError: the fact has another form.
    """
    try:
        sizes = tuple(Size(**dict(facts)) for facts in blueprint.get_extra(SIZES, ()))
        return sizes if sizes and sizes[0].is_whole(blueprint) else ()
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"the model's {SIZES} cannot be read ({error}); convert the original again") from error


def find_size(sizes: Sequence[Size], share: float, model: str) -> Size:
    """The size called `share` of the model named `model`.

    Raises:
        UsageError: the model has no such size, or no sizes at all.
    """
    if not sizes:
        raise UsageError(f"{model} has one size alone; potstill convert MODEL --to elastic makes a model of several")
    names = [format_share(size.share) for size in sizes]
    if format_share(share) not in names:
        raise UsageError(f"{model} has no size {format_share(share)}; choose one of {', '.join(names)}")
    return sizes[names.index(format_share(share))]


def name_size(model: str, share: float) -> str:
    """The name of a size of a model: `DIR#0.5`.

    Raises:
        UsageError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise UsageError(f"{share:g} is no size of a model; choose a share above 0 and up to 1, such as 0.5")
    return f"{model}#{format_share(share)}"


def format_share(share: float) -> str:
    """The name of a size: 0.5, or 1."""
    return f"{share:g}"


def name_student(share: float) -> str:
    """The name of the network that is a size of the student."""
    return f"{STUDENT}@{format_share(share)}"


def is_student(network: str) -> bool:
    """Whether a network is the student or a size of it."""
    return network.partition("@")[0] == STUDENT


def _keep_first(weight: Tensor, axes: Sequence[tuple[int, int]], units: int) -> Tensor:
    for axis, entries in axes:
        weight = weight.narrow(axis, 0, entries * units)
    return weight
