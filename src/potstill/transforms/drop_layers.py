"""Fewer layers: the choice of those that stay (evenly, by measured harm, by a score), and the transform.

Layers are counted from 0. Without a layer, the residual stream passes on unchanged.
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
from potstill.core.screen import track
from potstill.core.types import Batch, Weights
from potstill.models.backbone import Backbone
from potstill.models.eval_mode import eval_mode
from potstill.transforms.importance import LossFunction

LAYER = re.compile(r"layers\.(?P<layer>\d+)\.(?P<rest>.+)")


@dataclass(frozen=True)
class DropLayers:
    """Keeps the layers `keep` in their order, with new numbers without gaps; their weights do not change.

    Raises:
        UsageError: `keep` is empty, not in ascending order, or names a layer that the model does not have.
    """

    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.keep or list(self.keep) != sorted(set(self.keep)) or self.keep[0] < 0:
            raise UsageError(f"layers to keep {list(self.keep)} must be at least one, ascending, each named once")

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same blueprint with only these layers."""
        if self.keep[-1] >= len(old.layers):
            raise UsageError(f"layer {self.keep[-1]} does not exist; the model's layers are 0 to {len(old.layers) - 1}")
        return replace(old, layers=tuple(old.layers[i] for i in self.keep))

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The weights of these layers under their new numbers, and those outside the layers."""
        new_index = {layer: i for i, layer in enumerate(self.keep)}
        new: dict[str, Tensor] = {}
        for name, weight in weights.items():
            match = LAYER.fullmatch(name)
            if match is None:
                new[name] = weight
            elif int(match["layer"]) in new_index:
                new[f"layers.{new_index[int(match['layer'])]}.{match['rest']}"] = weight
        return new


def select_evenly(num_layers: int, keep: int, *, protect_first: int = 0, protect_last: int = 0) -> tuple[int, ...]:
    """`keep` of `num_layers` indices at equal distances, the first and the last layer included.

    The first `protect_first` and the last `protect_last` layers always stay. The choice is symmetric where the numbers
    allow it.

    Raises:
        UsageError: `keep` is not in 1..num_layers, or smaller than `protect_first + protect_last`.
    """
    _check_keep(num_layers, keep, protect_first + protect_last)
    num_inner, num_chosen = num_layers - protect_first - protect_last, keep - protect_first - protect_last
    lower = [_divide_rounded(i * (num_inner - 1), num_chosen - 1) for i in range(num_chosen // 2)]
    middle = [(num_inner - 1) // 2] if num_chosen % 2 else []
    upper = [num_inner - 1 - i for i in reversed(lower)]
    return (
        *range(protect_first),
        *(protect_first + i for i in lower + middle + upper),
        *range(num_layers - protect_last, num_layers),
    )


def select_highest(
    scores: Sequence[float], keep: int, *, protect_first: int = 0, protect_last: int = 0
) -> tuple[int, ...]:
    """The `keep` layers with the highest scores (`LayerAblation.alone`, `ImportanceScores.influence`), ascending.

    Of equal scores the earlier layer stays. The first `protect_first` and the last `protect_last` layers always stay.

    Raises:
        UsageError: `keep` is not in 1..len(scores), or smaller than `protect_first + protect_last`.
    """
    num_layers = len(scores)
    _check_keep(num_layers, keep, protect_first + protect_last)
    protected_layers = {*range(protect_first), *range(num_layers - protect_last, num_layers)}
    ranking = sorted(range(num_layers), key=lambda i: (i not in protected_layers, -float(scores[i]), i))
    return tuple(sorted(ranking[:keep]))


@dataclass(frozen=True)
class LayerAblation:
    """The measured harm of dropping layers, in the unit of the loss (nats), as means over the batches.

    `alone[l]` is the rise of the loss when only layer l is skipped. `order` lists the dropped layers, first to last,
    `after[i]` is the loss without `order[:i + 1]`, and `keep` are the other layers.
    """

    loss: float
    alone: tuple[float, ...]
    order: tuple[int, ...]
    after: tuple[float, ...]
    keep: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a card."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def ablate_layers(
    model: Backbone, batches: Sequence[Batch], loss: LossFunction, keep: int, *, greedy: bool = True
) -> LayerAblation:
    """Drops, one by one, the layers whose absence raises the loss least, until `keep` are left.

    With `greedy` the harms are measured again after each removal; else the first measurement decides. Skipping a layer
    costs about half a forward pass, since the layers below it do not run again. With L layers, the greedy choice costs
    (L - keep) L / 2 passes over `batches`, the other L / 2.

    Raises:
        UsageError: `keep` is not in 1..(number of layers).
        DataError: there are no batches, or the loss is not finite on the whole model.
    """
    layers = list(range(len(model.layers)))
    _check_keep(len(layers), keep, 0)
    with eval_mode(model), torch.no_grad():
        full_loss, harms = _measure_harms(model, batches, loss, layers)
        single_harms, order, losses_after = tuple(harms), [], []
        while len(layers) > keep:
            least_harmful = min(layers, key=lambda i: harms[layers.index(i)])
            del harms[layers.index(least_harmful)]
            layers.remove(least_harmful)
            order.append(least_harmful)
            if greedy and len(layers) > keep:
                current_loss, harms = _measure_harms(model, batches, loss, layers)
            else:
                current_loss = _compute_mean_loss([loss(_make_subnetwork(model, layers), batch) for batch in batches])
            losses_after.append(current_loss)
    return LayerAblation(full_loss, single_harms, tuple(order), tuple(losses_after), tuple(layers))


def _measure_harms(
    model: Backbone, batches: Sequence[Batch], loss: LossFunction, layers: list[int]
) -> tuple[float, list[float]]:
    """(mean loss of the network of `layers`, its rise when each of them is skipped)."""
    if not batches:
        raise DataError("there are no calibration batches; harm is measured on text")
    full_losses: list[Tensor] = []
    skip_losses: list[list[Tensor]] = []
    for number, batch in enumerate(batches, 1):
        title = "ranking layers" if len(batches) == 1 else f"ranking layers, batch {number} of {len(batches)}"
        positions = track(range(len(layers)), title)
        with _StreamCapture(model, layers) as capture:
            full_losses.append(loss(_make_subnetwork(model, layers), batch))
        ablations = ((capture.layer_inputs[i], layers[i + 1 :]) for i in positions)
        skip_losses.append(
            [loss(_make_subnetwork(model, layers_above, layer_input=rows), batch) for rows, layers_above in ablations]
        )
    base_loss = _compute_mean_loss(full_losses)
    if not math.isfinite(base_loss):
        raise DataError(
            f"the loss of {len(layers)} layers is {base_loss} on the calibration batches; check text and model"
        )
    return base_loss, [
        _compute_mean_loss(list(layer_losses)) - base_loss for layer_losses in zip(*skip_losses, strict=True)
    ]


class _StreamCapture:
    """Keeps the residual stream before each of `layers` in a forward pass inside the context."""

    def __init__(self, model: Backbone, layers: list[int]) -> None:
        self.layer_inputs: list[Tensor] = []
        self._blocks = [model.layers[i] for i in layers]

    def __enter__(self) -> "_StreamCapture":
        self._handles = [block.register_forward_pre_hook(self._capture_input) for block in self._blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _capture_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.layer_inputs.append(inputs[0])


class _FixedEmbedding(nn.Module):
    """An embedding that returns given vectors."""

    def __init__(self, rows: Float[Tensor, "B T D"]) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.rows


def _make_subnetwork(model: Backbone, layers: Sequence[int], *, layer_input: Tensor | None = None) -> Backbone:
    """The network of only these layers, with the weights of `model` itself; `layer_input` replaces the embeddings."""
    subnetwork = copy.copy(model)
    subnetwork._modules = dict(model._modules)  # the copy is shallow; replacing its modules must not change the model
    subnetwork.layers = nn.ModuleList(model.layers[i] for i in layers)
    if layers:
        subnetwork.blueprint = DropLayers(tuple(layers)).blueprint(model.blueprint)
    if layer_input is not None:
        subnetwork.embed = _FixedEmbedding(layer_input)  # type: ignore[assignment]
    return subnetwork


def _compute_mean_loss(losses: list[Tensor]) -> float:
    return torch.stack([loss.detach().double() for loss in losses]).mean().item()


def _divide_rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def _check_keep(num_layers: int, keep: int, num_protected: int) -> None:
    if not 1 <= keep <= num_layers:
        raise UsageError(f"cannot keep {keep} of {num_layers} layers; keep 1 to {num_layers}")
    if num_protected > keep:
        raise UsageError(f"cannot protect {num_protected} layers while keeping {keep}; protect fewer or keep more")
