"""Narrower layers: fewer key/value heads with their query heads, fewer feed-forward neurons, fewer hidden coordinates.

Whole groups of heads go, so head width and queries per key stay, and with them rotary positions and the stock families.
Kept units stay in their old order. `transforms/importance.py` measures what is worth keeping, `select` chooses by it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from potstill.core.blueprint import Attention, Blueprint, Layer, SwiGLU
from potstill.core.errors import UsageError
from potstill.core.types import Weights
from potstill.transforms.importance import Statistics

LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<part>.+)\.(?P<kind>weight|bias)")

Kept = tuple[int, ...]  # indices, ascending


@dataclass(frozen=True, kw_only=True)
class Narrow:
    """Keeps these units of each layer: key/value `heads[l]` (with their queries), `neurons[l]`; `hidden` everywhere.

    Removing heads or neurons gives the function of the old model with their masks at 0. Removing hidden coordinates
    does too, if norms take their mean over the kept ones; `gain` then multiplies the weight of the norm it names, so
    that the kept coordinates come out of it as large as before (see `select`). `None` keeps all; tied heads stay tied.

    Raises:
        UsageError: indices are not ascending, or not of this model; a layer would keep nothing.
    """

    heads: tuple[Kept, ...] | None = None
    neurons: tuple[Kept, ...] | None = None
    hidden: Kept | None = None
    gain: Mapping[str, float] = field(default_factory=dict)

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same blueprint with the widths of what is kept."""
        self._require_fit(old)
        layers = tuple(self._layer(i, layer) for i, layer in enumerate(old.layers))
        return replace(old, layers=layers, hidden=old.hidden if self.hidden is None else len(self.hidden))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """Rows and columns of the kept units; what no cut concerns is passed on as it is."""
        self._require_fit(old)
        new: dict[str, Tensor] = {}
        for name, weight in weights.items():
            for axis, index in self._cuts(name, old):
                weight = weight.index_select(axis, torch.tensor(index, device=weight.device))
            new[name] = weight
        centre = 1.0 if old.zero_centred_norms else 0.0
        rescaled = {norm: (new[f"{norm}.weight"] + centre) * gain - centre for norm, gain in self.gain.items()}
        return new | {f"{norm}.weight": weight for norm, weight in rescaled.items()}

    def _layer(self, i: int, layer: Layer) -> Layer:
        mixer, ffn = layer.mixer, layer.ffn
        if self.heads is not None:
            kept = len(self.heads[i])
            mixer = replace(mixer, heads=kept * mixer.heads // mixer.kv_heads, kv_heads=kept)
        if self.neurons is not None:
            ffn = replace(ffn, width=len(self.neurons[i]))
        return replace(layer, mixer=mixer, ffn=ffn)

    def _cuts(self, name: str, old: Blueprint) -> list[tuple[int, list[int]]]:
        """(axis, kept indices) for each axis of this weight that is cut."""
        hidden = None if self.hidden is None else list(self.hidden)
        hit = LAYER.fullmatch(name)
        if hit is None:
            rows, columns = (hidden, None) if name == "norm.weight" else (None, hidden)  # else embed or head
        else:
            layer = old.layers[int(hit["layer"])]
            rows, columns = self._axes(int(hit["layer"]), hit["part"], layer, hidden)
        axes = [rows] if name.endswith(("bias", "norm.weight")) else [rows, columns]
        return [(axis, index) for axis, index in enumerate(axes) if index is not None]

    def _axes(
        self, i: int, part: str, layer: Layer, hidden: list[int] | None
    ) -> tuple[list[int] | None, list[int] | None]:
        """(kept rows, kept columns) of one part of layer i; a norm or a bias has rows alone."""
        groups = None if self.heads is None else self.heads[i]
        neurons = None if self.neurons is None else list(self.neurons[i])
        match part:
            case "mixer.q":
                return _queries(groups, layer.mixer), hidden
            case "mixer.k" | "mixer.v":
                return _spans(groups, layer.mixer.head_dim), hidden
            case "mixer.o":
                return hidden, _queries(groups, layer.mixer)
            case "ffn.gate" | "ffn.up":
                return neurons, hidden
            case "ffn.down":
                return hidden, neurons
            case "mixer.q_norm" | "mixer.k_norm":
                return None, None
            case norm if norm in layer.norms():
                return hidden, None
        raise UsageError(f"narrow does not know the weight {part!r} of layer {i}")

    def _require_fit(self, old: Blueprint) -> None:
        if not all(isinstance(layer.mixer, Attention) and isinstance(layer.ffn, SwiGLU) for layer in old.layers):
            raise UsageError("narrow cuts attention and gated feed-forwards; this model has layers of another kind")
        for what, kept in (("heads", self.heads), ("neurons", self.neurons)):
            if kept is not None and len(kept) != len(old.layers):
                raise UsageError(f"{what} names {len(kept)} layers, the model has {len(old.layers)}")
        for i, layer in enumerate(old.layers):
            _require_indices(f"heads of layer {i}", self.heads[i] if self.heads else None, layer.mixer.kv_heads)
            _require_indices(f"neurons of layer {i}", self.neurons[i] if self.neurons else None, layer.ffn.width)
        _require_indices("hidden coordinates", self.hidden, old.hidden)
        if unknown := sorted(set(self.gain) - _norms(old)):
            raise UsageError(f"gain names {unknown[0]!r}, which is no norm of the residual stream of this model")


def select(
    statistics: Statistics,
    *,
    kv_heads: int | None = None,
    ffn: int | None = None,
    hidden: int | None = None,
    rescale: bool = True,
) -> Narrow:
    """Keeps, in every layer, the `kv_heads` and `ffn` neurons of highest importance, and the best `hidden` coordinates.

    The widths are those of every layer, so the result stays a stock model. Fewer units are always a subset of more.
    With `rescale`, each norm's gain is sqrt(mean energy of the kept coordinates), which is how much larger or smaller
    the RMS over them is than over all. Ours; MiniMA leaves that to training. SmolLM2-135M at 432 of 576 coordinates,
    untrained, on Python's docstrings: 5.54 nats a token with it, 5.91 without, 2.93 before.

    Raises:
        UsageError: a width is below 1 or above the model's.
    """
    gain: dict[str, float] = {}
    kept = None if hidden is None else _best("hidden", statistics.hidden, hidden)
    if kept is not None and rescale:
        gain = {norm: math.sqrt(energy[list(kept)].mean().item()) for norm, energy in statistics.energy.items()}
    return Narrow(
        heads=None if kv_heads is None else tuple(_best("kv_heads", s, kv_heads) for s in statistics.heads),
        neurons=None if ffn is None else tuple(_best("ffn", s, ffn) for s in statistics.neurons),
        hidden=kept,
        gain=gain,
    )


def _best(what: str, scores: Tensor, keep: int) -> Kept:
    if not 1 <= keep <= len(scores):
        raise UsageError(f"cannot keep {what} {keep} of {len(scores)}; keep 1 to {len(scores)}")
    ranked = scores.argsort(descending=True, stable=True)
    return tuple(sorted(ranked[:keep].tolist()))


def _spans(units: Kept | None, size: int) -> list[int] | None:
    """The rows of units that are `size` consecutive rows each."""
    return None if units is None else [unit * size + i for unit in units for i in range(size)]


def _queries(groups: Kept | None, mixer: Attention) -> list[int] | None:
    return _spans(groups, mixer.heads // mixer.kv_heads * mixer.head_dim)


def _norms(blueprint: Blueprint) -> set[str]:
    inside = {f"layers.{i}.{norm}" for i, layer in enumerate(blueprint.layers) for norm in layer.norms()}
    return inside | {"norm"}


def _require_indices(what: str, kept: Kept | None, size: int) -> None:
    if kept is None:
        return
    if not kept:
        raise UsageError(f"no {what} would be kept; keep at least one")
    if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise UsageError(f"{what} to keep must be ascending indices from 0 to {size - 1}, not {list(kept)[:8]}")
