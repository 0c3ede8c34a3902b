"""The importance of each head, neuron, hidden coordinate and layer on calibration text, measured in one pass.

The first-order score of a unit is |dL/dmask| at mask = 1, where the mask multiplies the output of the unit
(arXiv:1905.10650, Eq. 3; MiniMA, arXiv:2311.07052, prunes by it). No mask is built: for a unit whose output is `a`,

    dL/dmask = sum over tokens of <a, dL/da>

So hooks keep each activation where it enters the next module, with its gradient. One backward pass gives all scores.
The units are those of the cuts that the parts of each layer declare (`core.parts.Cut`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from potstill.core.blueprint import Blueprint
from potstill.core.errors import DataError
from potstill.core.screen import track
from potstill.core.types import Batch, supervised_positions
from potstill.models.backbone import Backbone
from potstill.models.eval_mode import eval_mode
from potstill.models.hooks import temporary_hooks
from potstill.ops.precision import upcast

LossFunction = Callable[[Backbone, Batch], Tensor]  # the mean over the batch, a scalar with a gradient

EPS = 1e-17  # keeps the score of a layer in which nothing matters at 0, as in MiniMA's code


@dataclass(frozen=True)
class ImportanceScores:
    """The scores, which have no unit: those of a layer (and `hidden`) have Euclidean length 1, or are all 0.

    `units[name][l]` holds one score for each unit of the cut `name` in layer l, and None where that layer has no such
    cut: `kv_heads` are key/value heads with their query heads, `ffn` neurons. `hidden` holds one for each coordinate of
    the residual stream. `influence[l]` = 1 - mean cos(x_in, x_out) is how far layer l turns the residual stream
    (ShortGPT, arXiv:2403.03853, Eq. 2). `energy[norm][d]` is the mean over tokens of x_d^2 / mean(x^2) before that
    norm: 1 for a coordinate of average size.
    """

    units: Mapping[str, tuple[Float[Tensor, " U"] | None, ...]]
    hidden: Float[Tensor, " D"]
    influence: Float[Tensor, " L"]
    energy: Mapping[str, Float[Tensor, " D"]]
    loss: float  # the mean over batches, in the unit of the loss (nats)
    batches: int
    tokens: int


def measure_importance(model: Backbone, batches: Sequence[Batch], loss: LossFunction) -> ImportanceScores:
    """First-order importance on `batches`: |dL/dmask| of each batch's mean loss, averaged over the batches.

    The model runs in eval mode, and returns to the mode that it was in; no weight's `grad` changes. Batches should have
    one size: a batch is averaged before |.|, so its size sets how far opposite gradients cancel. Scores are summed in
    float32 (float64 for a float64 model), with autocast or without.

    Raises:
        DataError: there are no batches, or the loss is not finite on one.
    """
    sums = _RunningSums()
    with eval_mode(model), torch.enable_grad():
        for batch_index, batch in enumerate(track(batches, "measuring the importance of units")):
            with _capture_inputs(model) as activations:
                value = loss(model, batch)
            if not torch.isfinite(value):
                raise DataError(f"the loss is {value.item()} on calibration batch {batch_index}; leave that batch out")
            sums.add_scores(_compute_scores(model, activations, torch.autograd.grad(value, list(activations.values()))))
            sums.count_batch(value, batch)
    return sums.compute_averages(model)


def next_token_loss(model: Backbone, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy of the supervised next tokens, in nats.

    Raises:
        DataError: no token of the batch is trained on.
    """
    positions, targets, _ = supervised_positions(batch)
    if not len(targets):
        raise DataError("no token of a calibration batch is trained on; calibrate on text with labels")
    rows = model(batch["input_ids"], batch["position_ids"])[positions]
    return cross_entropy(model.head().logits(rows).float(), targets)


@contextmanager
def _capture_inputs(model: Backbone) -> Iterator[dict[str, Tensor]]:
    """The inputs of norms, of gated layers and of modules where a cut is measured, in a forward pass inside it."""
    captured_inputs: dict[str, Tensor] = {}

    def make_hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured_inputs[name] = inputs[0]

        return hook

    def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.requires_grad_()  # a frozen model has no graph otherwise; its weights' flags stay as they are

    handles = [
        model.get_submodule(name).register_forward_pre_hook(make_hook(name)) for name in _list_hooked_modules(model)
    ]
    handles.append(model.embed.register_forward_hook(require_grad))
    with temporary_hooks(handles):
        yield captured_inputs


def _list_hooked_modules(model: Backbone) -> list[str]:
    names = ["norm"]
    for i, layer in enumerate(model.blueprint.layers):
        measured = (module for cut in layer.cuts().values() for module in cut.measured_at)
        names += [f"layers.{i}.{module}" for module in (*layer.norm_names(), *measured)]
        names += [] if layer.depth is None else [f"layers.{i}"]
    return names


def _list_boundaries(blueprint: Blueprint) -> list[list[str]]:
    """For each layer, the modules whose inputs are the residual stream before its halves, in the order of the pass.

    Behind a depth gate the norms see some of the tokens, so such a layer counts as one step.
    """
    return [
        [f"layers.{i}.mixer_norm", f"layers.{i}.ffn_norm"] if layer.depth is None else [f"layers.{i}"]
        for i, layer in enumerate(blueprint.layers)
    ]


def _compute_scores(model: Backbone, inputs: dict[str, Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """The scores of one batch, by name."""
    gradient_by_name = {name: upcast(g) for name, g in zip(inputs, gradients, strict=True)}
    activations = {name: upcast(a.detach()) for name, a in inputs.items()}
    products = {name: (activations[name] * gradient_by_name[name]).flatten(0, -2).sum(0) for name in inputs}
    scores: dict[str, Tensor] = {}
    for i, layer in enumerate(model.blueprint.layers):
        for name, cut in layer.cuts().items():
            # a module without tokens, such as that of an idle expert, has no input; its units add nothing
            used = [key for module in cut.measured_at if (key := f"layers.{i}.{module}") in products]
            total = products["norm"].new_zeros(cut.size)
            for key in used:
                total = total + products[key].unflatten(0, (cut.size, -1)).sum(-1)
            scores[f"{name}.{i}"] = total.abs()
    boundaries = _list_boundaries(model.blueprint)
    stream = [*chain(*boundaries), "norm"]
    scores["hidden"] = _score_coordinates(
        [activations[name] for name in stream], [gradient_by_name[name] for name in stream]
    )
    scores["energy.norm"] = _compute_energy(activations["norm"])
    for i, layer in enumerate(model.blueprint.layers):
        for name in (f"layers.{i}.{norm}" for norm in layer.norm_names()):  # without any token, the layer's input
            scores[f"energy.{name}"] = _compute_energy(activations.get(name, activations[boundaries[i][0]]))
    layer_inputs = [activations[name] for name in (*(names[0] for names in boundaries), "norm")]
    for i, (before, after) in enumerate(pairwise(layer_inputs)):
        scores[f"influence.{i}"] = 1 - cosine_similarity(before, after, dim=-1).mean()
    return scores


def _score_coordinates(stream: list[Tensor], gradients: list[Tensor]) -> Float[Tensor, " D"]:
    """|dL/deta| for one mask eta on the embeddings, on what each half-layer adds, and on the stream after it."""
    total = (stream[0] * gradients[0]).flatten(0, -2).sum(0)
    for previous, current, gradient in zip(stream, stream[1:], gradients[1:], strict=False):
        total = total + ((current - previous) * gradient + current * gradient).flatten(0, -2).sum(0)
    return total.abs()


def _compute_energy(x: Float[Tensor, "*B D"]) -> Float[Tensor, " D"]:
    squares = x.pow(2)  # relative to its own token, since a few tokens of some models are a thousand times the others
    return (squares / squares.mean(-1, keepdim=True).clamp_min(EPS)).flatten(0, -2).mean(0)


@dataclass
class _RunningSums:
    """Running sums over batches."""

    values: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    batches: int = 0
    tokens: int = 0

    def add_scores(self, scores: dict[str, Tensor]) -> None:
        for name, value in scores.items():
            self.values[name] = self.values[name] + value if name in self.values else value

    def count_batch(self, loss: Tensor, batch: Batch) -> None:
        self.loss += loss.item()
        self.batches += 1
        self.tokens += batch["input_ids"].numel()

    def compute_averages(self, model: Backbone) -> ImportanceScores:
        if not self.batches:
            raise DataError("there are no calibration batches; importance is measured on text")
        means = {name: value / self.batches for name, value in self.values.items()}
        layers = range(len(model.layers))
        cuts = dict.fromkeys(name for layer in model.blueprint.layers for name in layer.cuts())
        return ImportanceScores(
            units={
                name: tuple(_normalize_scores(means[key]) if (key := f"{name}.{i}") in means else None for i in layers)
                for name in cuts
            },
            hidden=_normalize_scores(means["hidden"]),
            influence=torch.stack([means[f"influence.{i}"] for i in layers]),
            energy={k.removeprefix("energy."): v for k, v in means.items() if k.startswith("energy.")},
            loss=self.loss / self.batches,
            batches=self.batches,
            tokens=self.tokens,
        )


def _normalize_scores(scores: Tensor) -> Tensor:
    return scores / (scores.norm() + EPS)
