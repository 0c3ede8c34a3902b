"""How much each head, neuron, hidden coordinate and layer matters on calibration text, measured in one pass.

The first-order score of a unit is |dL/dmask| at mask = 1, where the mask multiplies what the unit hands on
(arXiv:1905.10650, Eq. 3; MiniMA, arXiv:2311.07052, prunes by it). No mask is built: for a unit whose output is `a`,

    dL/dmask = sum over tokens of <a, dL/da>

so each activation is caught where it enters the next module, with its gradient, and one backward pass gives all scores.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from potstill.core.errors import DataError
from potstill.core.types import Batch, supervised
from potstill.models.backbone import Backbone
from potstill.models.evaluating import evaluating

Loss = Callable[[Backbone, Batch], Tensor]  # the mean over the batch, a scalar with a gradient

TINY = 1e-17  # keeps the score of a layer in which nothing matters at 0, as in MiniMA's code


@dataclass(frozen=True)
class Statistics:
    """What `measure` found. Scores have no unit: those of a layer (and `hidden`) have Euclidean length 1, or are all 0.

    `heads[l]` holds one score for each key/value head with its query heads, `neurons[l]` one for each feed-forward
    neuron, `hidden` one for each coordinate of the residual stream. `influence[l]` = 1 - mean cos(x_in, x_out) says how
    far layer l turns the residual stream (ShortGPT, arXiv:2403.03853, Eq. 2). `energy[norm][d]` is the mean over tokens
    of x_d^2 / mean(x^2) before that norm: 1 for a coordinate of average size.
    """

    heads: tuple[Float[Tensor, " G"], ...]
    neurons: tuple[Float[Tensor, " F"], ...]
    hidden: Float[Tensor, " D"]
    influence: Float[Tensor, " L"]
    energy: Mapping[str, Float[Tensor, " D"]]
    loss: float  # the mean over batches, in the unit of the loss (nats)
    batches: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The scalars and the scores per layer as plain numbers, for a card; energies are left out."""
        return {
            "loss": self.loss,
            "batches": self.batches,
            "tokens": self.tokens,
            "heads": [layer.tolist() for layer in self.heads],
            "influence": self.influence.tolist(),
        }


def measure(model: Backbone, batches: Sequence[Batch], loss: Loss) -> Statistics:
    """First-order importance on `batches`, |.| taken of each batch's mean loss and averaged over batches.

    The model is in eval mode meanwhile and afterwards as it was; no weight's `grad` is touched. Batches should be of
    one size: a batch is averaged before |.|, so its size sets how far opposite gradients cancel. Scores add up in
    float32 (float64 for a float64 model) whatever autocast does.

    Raises:
        DataError: there are no batches, or the loss is not finite on one.
    """
    sums = _Sums()
    with evaluating(model), torch.enable_grad():
        for number, batch in enumerate(batches):
            with _entering(model) as seen:
                value = loss(model, batch)
            if not torch.isfinite(value):
                raise DataError(f"the loss is {value.item()} on calibration batch {number}; leave that batch out")
            sums.add(_scores(model, seen, torch.autograd.grad(value, list(seen.values()))))
            sums.count(value, batch)
    return sums.statistics(model)


def next_token_loss(model: Backbone, batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy of the supervised next tokens, in nats.

    Raises:
        DataError: no token of the batch is trained on.
    """
    positions, targets, _ = supervised(batch)
    if not len(targets):
        raise DataError("no token of a calibration batch is trained on; calibrate on text with labels")
    rows = model(batch["input_ids"], batch["position_ids"])[positions]
    return cross_entropy(model.head().logits(rows).float(), targets)


@contextmanager
def _entering(model: Backbone) -> Iterator[dict[str, Tensor]]:
    """What enters each norm, output projection and down projection, filled during a forward pass inside."""
    seen: dict[str, Tensor] = {}

    def catch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0]

        return hook

    def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.requires_grad_()  # a frozen model has no graph otherwise; its weights' flags stay as they are

    handles = [model.get_submodule(name).register_forward_pre_hook(catch(name)) for name in _sites(model)]
    handles.append(model.embed.register_forward_hook(require_grad))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _sites(model: Backbone) -> list[str]:
    parts = (
        (i, part) for i, layer in enumerate(model.blueprint.layers) for part in (*layer.norms(), "mixer.o", "ffn.down")
    )
    return [f"layers.{i}.{part}" for i, part in parts] + ["norm"]


def _scores(model: Backbone, seen: dict[str, Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
    """What one batch adds to each sum, by name."""
    slope = {name: _wide(g) for name, g in zip(seen, gradients, strict=True)}
    value = {name: _wide(a.detach()) for name, a in seen.items()}
    product = {name: (value[name] * slope[name]).flatten(0, -2).sum(0) for name in seen}
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(model.blueprint.layers):
        found[f"heads.{i}"] = product[f"layers.{i}.mixer.o"].unflatten(0, (layer.mixer.kv_heads, -1)).sum(-1).abs()
        found[f"neurons.{i}"] = product[f"layers.{i}.ffn.down"].abs()
    norms = [name for name in seen if name.endswith("norm")]
    stream = [name for name in norms if not name.endswith("post_norm")]  # in the order of the pass
    found["hidden"] = _coordinates([value[name] for name in stream], [slope[name] for name in stream])
    for name in norms:
        found[f"energy.{name}"] = _energy(value[name])
    ends = [value[name] for name in stream[::2]]  # the stream before each layer, and after the last
    for i in range(len(ends) - 1):
        found[f"influence.{i}"] = 1 - cosine_similarity(ends[i], ends[i + 1], dim=-1).mean()
    return found


def _coordinates(stream: list[Tensor], slope: list[Tensor]) -> Float[Tensor, " D"]:
    """|dL/deta| for one mask eta on the embeddings, on what each half-layer adds, and on the stream after it."""
    total = (stream[0] * slope[0]).flatten(0, -2).sum(0)
    for before, after, g in zip(stream, stream[1:], slope[1:], strict=False):
        total = total + ((after - before) * g + after * g).flatten(0, -2).sum(0)
    return total.abs()


def _energy(x: Float[Tensor, "*B D"]) -> Float[Tensor, " D"]:
    square = x.pow(2)  # relative to its own token, since a few tokens of some models are a thousand times the others
    return (square / square.mean(-1, keepdim=True).clamp_min(TINY)).flatten(0, -2).mean(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass
class _Sums:
    """Running sums over batches."""

    values: dict[str, Tensor] = field(default_factory=dict)
    loss: float = 0.0
    batches: int = 0
    tokens: int = 0

    def add(self, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            self.values[name] = self.values[name] + value if name in self.values else value

    def count(self, loss: Tensor, batch: Batch) -> None:
        self.loss += loss.item()
        self.batches += 1
        self.tokens += batch["input_ids"].numel()

    def statistics(self, model: Backbone) -> Statistics:
        if not self.batches:
            raise DataError("there are no calibration batches; importance is measured on text")
        mean = {name: value / self.batches for name, value in self.values.items()}
        layers = range(len(model.layers))
        return Statistics(
            heads=tuple(_unit(mean[f"heads.{i}"]) for i in layers),
            neurons=tuple(_unit(mean[f"neurons.{i}"]) for i in layers),
            hidden=_unit(mean["hidden"]),
            influence=torch.stack([mean[f"influence.{i}"] for i in layers]),
            energy={k.removeprefix("energy."): v for k, v in mean.items() if k.startswith("energy.")},
            loss=self.loss / self.batches,
            batches=self.batches,
            tokens=self.tokens,
        )


def _unit(scores: Tensor) -> Tensor:
    return scores / (scores.norm() + TINY)
