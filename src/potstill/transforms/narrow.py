"""Narrower layers: fewer units of the cuts that parts declare (heads, neurons), fewer hidden coordinates.

A key/value head goes with all its query heads. So head width and queries per key stay, and with them rotary positions
and the stock families. The units that stay keep their order. `transforms/importance.py` measures which units matter,
`select_units` chooses by it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, find_cut_axes, weight_shapes
from potstill.core.errors import UsageError
from potstill.core.parts import Axes, compare_shapes
from potstill.core.types import Weights
from potstill.transforms.importance import ImportanceScores

Indices = tuple[int, ...]  # indices, ascending


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Keeps the units `units[name][l]` of each cut `name` in layer l, and the coordinates `hidden` everywhere.

    Removing units gives the function of the old model with their masks at 0. Removing hidden coordinates does too, if
    norms take their mean over the coordinates that stay. `gain` multiplies the weight of each norm that it names, so
    that those coordinates leave the norm as large as before (see `select_units`). A depth gate divides by the same root
    as its layer's first norm, and gets that norm's gain. `None` keeps all, and stands in `units[name]` for a layer
    without that cut. Tied heads stay tied.

    Raises:
        UsageError: indices are not ascending or out of range, a layer has no such cut, or a layer would keep nothing.
    """

    units: Mapping[str, tuple[Indices | None, ...]] = field(default_factory=dict)
    hidden: Indices | None = None
    gain: Mapping[str, float] = field(default_factory=dict)

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same blueprint with the widths of the units that stay."""
        self._check_blueprint(old)
        sizes = [{name: len(units) for name, units in self._list_units(i)} for i in range(len(old.layers))]
        layers = tuple(layer.resize(sizes[i]) if sizes[i] else layer for i, layer in enumerate(old.layers))
        return replace(old, layers=layers, hidden=old.hidden if self.hidden is None else len(self.hidden))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The rows and columns of the units that stay; weights without such rows and columns are unchanged."""
        self._check_blueprint(old)
        new = dict(weights)
        for i, layer in enumerate(old.layers):
            for name, units in self._list_units(i):
                select_entries(new, find_cut_axes(layer, name, old.hidden), units, prefix=f"layers.{i}.")
        if self.hidden is not None:
            wider = replace(old, hidden=old.hidden + 1)
            select_entries(new, compare_shapes(weight_shapes(old), weight_shapes(wider)), self.hidden)
        center = 1.0 if old.zero_centred_norms else 0.0
        rescaled_norms = {norm: (new[f"{norm}.weight"] + center) * gain - center for norm, gain in self.gain.items()}
        gates = ((f"layers.{i}.mixer_norm", f"layers.{i}.depth.gate.weight") for i in range(len(old.layers)))
        rescaled_gates = {
            gate: new[gate] * self.gain[norm] for norm, gate in gates if gate in new and norm in self.gain
        }
        return new | {f"{norm}.weight": weight for norm, weight in rescaled_norms.items()} | rescaled_gates

    def _list_units(self, i: int) -> list[tuple[str, Indices]]:
        """The name and the units of each cut of layer i."""
        return [(name, units) for name, layers in self.units.items() if (units := layers[i]) is not None]

    def _check_blueprint(self, old: Blueprint) -> None:
        if old != old.trainable_form:
            raise UsageError("the model's matrices are packed; prune the model that they were packed from")
        for name, layers in self.units.items():
            if len(layers) != len(old.layers):
                raise UsageError(f"{name} names {len(layers)} layers, the model has {len(old.layers)}")
        for i, layer in enumerate(old.layers):
            cuts = layer.cuts()
            for name, units in self._list_units(i):
                if name not in cuts:
                    raise UsageError(f"layer {i} has no {name} to cut; it is made of {layer.describe()}")
                _check_indices(f"{name} of layer {i}", units, cuts[name].size)
        if self.hidden is not None:
            _check_indices("hidden coordinates", self.hidden, old.hidden)
        if unknown_norms := sorted(set(self.gain) - _list_norms(old)):
            raise UsageError(f"gain names {unknown_norms[0]!r}, which is no norm of the residual stream of this model")


def select_units(
    statistics: ImportanceScores, *, hidden: int | None = None, rescale: bool = True, **sizes: int | None
) -> Narrow:
    """Keeps the most important `hidden` coordinates, and `sizes[name]` units of each cut in every layer that has it.

    The widths are equal in all layers, so the result stays a stock model. Fewer units are always a subset of more.
    With `rescale`, each norm's gain is sqrt(mean energy of the coordinates that stay): the ratio of the RMS over them
    to the RMS over all. Ours; MiniMA leaves that to training. SmolLM2-135M at 432 of 576 coordinates, untrained, on
    Python's docstrings: 5.54 nats a token with it, 5.91 without, 2.93 before.

    Raises:
        UsageError: a width is below 1 or above the model's, or no layer has a cut of that name.
    """
    gain: dict[str, float] = {}
    hidden_indices = None if hidden is None else _select_best("hidden", statistics.hidden, hidden)
    if hidden_indices is not None and rescale:
        gain = {
            norm: math.sqrt(energy[list(hidden_indices)].mean().item()) for norm, energy in statistics.energy.items()
        }
    units: dict[str, tuple[Indices | None, ...]] = {}
    for name, size in sizes.items():
        if name not in statistics.units:
            raise UsageError(f"no layer of this model has {name} to cut; there are {', '.join(statistics.units)}")
        if size is not None:
            layers = statistics.units[name]
            units[name] = tuple(None if scores is None else _select_best(name, scores, size) for scores in layers)
    return Narrow(units=units, hidden=hidden_indices, gain=gain)


def select_entries(weights: dict[str, Tensor], axes: Axes, units: Indices, *, prefix: str = "") -> None:
    """Keeps, in place, only the entries of `units` along `axes`, in the order of `units`."""
    for name, weight_axes in axes.items():
        for axis, size in weight_axes:
            weight = weights[f"{prefix}{name}"]
            entries = [unit * size + i for unit in units for i in range(size)]
            weights[f"{prefix}{name}"] = weight.index_select(axis, torch.tensor(entries, device=weight.device))


def _select_best(label: str, scores: Tensor, keep: int) -> Indices:
    if not 1 <= keep <= len(scores):
        raise UsageError(f"cannot keep {label} {keep} of {len(scores)}; keep 1 to {len(scores)}")
    ranking = scores.argsort(descending=True, stable=True)
    return tuple(sorted(ranking[:keep].tolist()))


def _list_norms(blueprint: Blueprint) -> set[str]:
    layer_norms = {f"layers.{i}.{norm}" for i, layer in enumerate(blueprint.layers) for norm in layer.norm_names()}
    return layer_norms | {"norm"}


def _check_indices(label: str, indices: Indices, size: int) -> None:
    if not indices:
        raise UsageError(f"no {label} would be kept; keep at least one")
    if list(indices) != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise UsageError(f"{label} to keep must be ascending indices from 0 to {size - 1}, not {list(indices)[:8]}")
