"""Fewer layers: which to keep (evenly, by measured harm, by a score), and the transform that drops the others.

Layers are counted from 0. A dropped layer leaves the residual stream as it finds it.
"""

import copy
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from potstill.core.blueprint import Blueprint
from potstill.core.errors import DataError, UsageError
from potstill.core.types import Batch, Weights
from potstill.models.backbone import Backbone
from potstill.models.evaluating import evaluating
from potstill.transforms.importance import Loss

LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class DropLayers:
    """Keeps the layers `keep`, in their order, numbered anew without gaps; every weight that stays is unchanged.

    Raises:
        UsageError: `keep` is empty, not in ascending order, or names a layer that the model does not have.
    """

    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.keep or list(self.keep) != sorted(set(self.keep)) or self.keep[0] < 0:
            raise UsageError(f"layers to keep {list(self.keep)} must be at least one, ascending, each named once")

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same blueprint with the kept layers alone."""
        if self.keep[-1] >= len(old.layers):
            raise UsageError(f"layer {self.keep[-1]} does not exist; the model's layers are 0 to {len(old.layers) - 1}")
        return replace(old, layers=tuple(old.layers[i] for i in self.keep))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The kept layers' weights under their new numbers, and all that belongs to no layer."""
        number = {layer: i for i, layer in enumerate(self.keep)}
        new: dict[str, Tensor] = {}
        for name, weight in weights.items():
            hit = LAYER.fullmatch(name)
            if hit is None:
                new[name] = weight
            elif int(hit["layer"]) in number:
                new[f"layers.{number[int(hit['layer'])]}.{hit['rest']}"] = weight
        return new


def evenly(layers: int, keep: int, *, first: int = 0, last: int = 0) -> tuple[int, ...]:
    """`keep` of `layers` indices at equal distances, both ends among them.

    The `first` and `last` ones stay in any case. The choice is its own mirror image where the numbers allow one.

    Raises:
        UsageError: `keep` is not in 1..layers, or smaller than `first + last`.
    """
    _require_possible(layers, keep, first + last)
    inner, chosen = layers - first - last, keep - first - last
    left = [_nearest(i * (inner - 1), chosen - 1) for i in range(chosen // 2)]
    middle = [(inner - 1) // 2] if chosen % 2 else []
    right = [inner - 1 - i for i in reversed(left)]
    return (*range(first), *(first + i for i in left + middle + right), *range(layers - last, layers))


def highest(scores: Sequence[float], keep: int, *, first: int = 0, last: int = 0) -> tuple[int, ...]:
    """The `keep` layers with the highest scores (`Harm.alone`, `Statistics.influence`), ascending.

    Ties keep the earlier layer. The `first` and `last` ones stay in any case.

    Raises:
        UsageError: `keep` is not in 1..len(scores), or smaller than `first + last`.
    """
    layers = len(scores)
    _require_possible(layers, keep, first + last)
    safe = {*range(first), *range(layers - last, layers)}
    ranked = sorted(range(layers), key=lambda i: (i not in safe, -float(scores[i]), i))
    return tuple(sorted(ranked[:keep]))


@dataclass(frozen=True)
class Harm:
    """What dropping layers costs, measured: losses in the unit of the loss (nats), means over the batches.

    `alone[l]` is the rise of the loss when layer l alone is skipped. `order` lists the layers as they were given up,
    `after[i]` is the loss with `order[:i + 1]` gone, and `keep` are the others.
    """

    loss: float
    alone: tuple[float, ...]
    order: tuple[int, ...]
    after: tuple[float, ...]
    keep: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a card."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def by_harm(model: Backbone, batches: Sequence[Batch], loss: Loss, keep: int, *, greedy: bool = True) -> Harm:
    """Gives up, one by one, the layers whose absence raises the loss least, until `keep` are left.

    Greedy, the harms are measured anew after each removal; else the first measurement decides all. A measurement costs
    about half a forward pass for each layer, since the layers below the skipped one are not run again: with L layers,
    (L - keep) L / 2 passes over `batches` for the greedy choice and L / 2 for the other.

    Raises:
        UsageError: `keep` is not in 1..layers.
        DataError: there are no batches, or the loss is not finite on the whole model.
    """
    layers = list(range(len(model.layers)))
    _require_possible(len(layers), keep, 0)
    with evaluating(model), torch.no_grad():
        whole, harms = _harms(model, batches, loss, layers)
        alone, order, after = tuple(harms), [], []
        while len(layers) > keep:
            gone = min(layers, key=lambda i: harms[layers.index(i)])
            del harms[layers.index(gone)]
            layers.remove(gone)
            order.append(gone)
            if greedy and len(layers) > keep:
                current, harms = _harms(model, batches, loss, layers)
            else:
                current = _mean([loss(_network(model, layers), batch) for batch in batches])
            after.append(current)
    return Harm(whole, alone, tuple(order), tuple(after), tuple(layers))


def _harms(model: Backbone, batches: Sequence[Batch], loss: Loss, layers: list[int]) -> tuple[float, list[float]]:
    """(mean loss of the network of `layers`, the rise of it when each one of them is skipped)."""
    if not batches:
        raise DataError("there are no calibration batches; harm is measured on text")
    whole: list[Tensor] = []
    skipped: list[list[Tensor]] = []
    for batch in batches:
        with _Stream(model, layers) as stream:
            whole.append(loss(_network(model, layers), batch))
        rest = ((stream.entering[i], layers[i + 1 :]) for i in range(len(layers)))
        skipped.append([loss(_network(model, above, entering=rows), batch) for rows, above in rest])
    base = _mean(whole)
    if not math.isfinite(base):
        raise DataError(f"the loss of {len(layers)} layers is {base} on the calibration batches; check text and model")
    return base, [_mean(list(column)) - base for column in zip(*skipped, strict=True)]


class _Stream:
    """Catches the residual stream before each of `layers` while a forward pass runs inside."""

    def __init__(self, model: Backbone, layers: list[int]) -> None:
        self.entering: list[Tensor] = []
        self._blocks = [model.layers[i] for i in layers]

    def __enter__(self) -> "_Stream":
        self._handles = [block.register_forward_pre_hook(self._catch) for block in self._blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _catch(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.entering.append(inputs[0])


class _Given(nn.Module):
    """An embedding that knows its answer already."""

    def __init__(self, rows: Float[Tensor, "B T D"]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.rows


def _network(model: Backbone, layers: Sequence[int], *, entering: Tensor | None = None) -> Backbone:
    """The network of these layers alone, on the very weights of `model`; it begins with the stream `entering`."""
    view = copy.copy(model)
    view._modules = dict(model._modules)  # the copy is shallow, and its parts are swapped without touching the model's
    view.layers = nn.ModuleList(model.layers[i] for i in layers)
    if layers:
        view.blueprint = DropLayers(tuple(layers)).blueprint(model.blueprint)
    if entering is not None:
        view.embed = _Given(entering)  # type: ignore[assignment]
    return view


def _mean(losses: list[Tensor]) -> float:
    return torch.stack([loss.detach().double() for loss in losses]).mean().item()


def _nearest(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _require_possible(layers: int, keep: int, protected: int) -> None:
    if not 1 <= keep <= layers:
        raise UsageError(f"cannot keep {keep} of {layers} layers; keep 1 to {layers}")
    if protected > keep:
        raise UsageError(f"cannot protect {protected} layers while keeping {keep}; protect fewer or keep more")
