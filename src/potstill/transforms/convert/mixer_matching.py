"""Trains new mixers to give the outputs of the old ones on the same inputs: the first stage after a conversion.

The old model reads calibration text. Each new mixer reads the inputs of the old mixer in its layer, and its relative
error is

    sum over tokens of |new(x_t) - old(x_t)|^2 / sum over tokens of |old(x_t)|^2

So layers are trained independently of one another, as in the first stages of MOHAWK (arXiv:2408.10189, Section 3.2)
and LoLCATs (arXiv:2410.10254, Section 3.1).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from potstill.core.screen import track
from potstill.core.types import Batch
from potstill.layers.positions import Positions
from potstill.models.backbone import Backbone
from potstill.models.hooks import temporary_hooks

ROW_TOKENS = 512
HELD_OUT = 8  # one row of so many is not trained on; errors are measured there
RIDGE = 1e-2  # of the mean square of a feature, the weight of the old matrix in a least-squares fit


class MixerCall(NamedTuple):
    """The inputs and the output of one mixer in a pass."""

    x: Float[Tensor, "B T D"]
    positions: Positions
    y: Float[Tensor, "B T D"]


def split_rows(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(rows to train on, rows to measure on), of at most `ROW_TOKENS` tokens; a single row serves both."""
    rows: list[Batch] = [
        {"input_ids": ids[None], "position_ids": positions[None]}
        for batch in batches
        for pack in zip(batch["input_ids"], batch["position_ids"], strict=True)
        for ids, positions in zip(*(values.split(ROW_TOKENS) for values in pack), strict=True)
    ]
    if len(rows) == 1:
        return rows, rows
    measured = range(0, len(rows), HELD_OUT)
    return [row for i, row in enumerate(rows) if i not in measured], [rows[i] for i in measured]


@torch.no_grad()
def read_mixers(model: Backbone, batch: Batch, layers: Sequence[int]) -> dict[int, MixerCall]:
    """What the mixers of `layers` read and give on a batch."""
    calls: dict[int, MixerCall] = {}

    def make_hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[layer] = MixerCall(inputs[0], inputs[1], output[0])

        return hook

    mixers = {layer: model.layers[layer].get_submodule("mixer") for layer in layers}
    with temporary_hooks([mixer.register_forward_hook(make_hook(layer)) for layer, mixer in mixers.items()]):
        model(batch["input_ids"], batch["position_ids"])
    return calls


@torch.no_grad()
def measure_errors(model: Backbone, mixers: Mapping[int, nn.Module], rows: Sequence[Batch]) -> dict[int, float]:
    """The relative error of each new mixer on `rows`, by layer."""
    errors, sizes = dict.fromkeys(mixers, 0.0), dict.fromkeys(mixers, 0.0)
    for row in rows:
        for layer, call in read_mixers(model, row, [*mixers]).items():
            y, _ = mixers[layer](call.x, call.positions, None)
            errors[layer] += float((y - call.y).float().square().sum())
            sizes[layer] += float(call.y.float().square().sum())
    return {layer: errors[layer] / max(sizes[layer], 1e-30) for layer in mixers}


@torch.no_grad()
def fit_outputs(model: Backbone, mixers: Mapping[int, nn.Module], rows: Sequence[Batch]) -> None:
    """Sets the output matrix `o` of each new mixer to the least-squares fit of the old outputs, in place.

    With features f_t, the inputs of `o`, it minimizes the sum of |O f_t - old(x_t)|^2 + lambda |O - O_0|^2.
    """
    sums = {layer: LeastSquares() for layer in mixers}
    for row in track(rows, "fitting the outputs of the new mixers"):
        for layer, call in read_mixers(model, row, [*mixers]).items():
            features: list[Tensor] = []
            output = mixers[layer].get_submodule("o")
            with temporary_hooks(
                [output.register_forward_pre_hook(lambda _, inputs, into=features: into.append(inputs[0]))]
            ):
                y, _ = mixers[layer](call.x, call.positions, None)
            sums[layer].add(features[0].flatten(0, 1), (call.y - y).flatten(0, 1))
    for layer, least_squares in sums.items():
        mixers[layer].get_submodule("o").get_parameter("weight").add_(least_squares.solve().mT)
    torch.clear_autocast_cache()  # it holds the weights in bf16


def train_mixers(
    model: Backbone, mixers: Mapping[int, nn.Module], rows: Sequence[Batch], *, learning_rate: float
) -> None:
    """A step of Adam on the relative errors for each row, in place; the learning rate falls linearly to 0."""
    weights = [weight for mixer in mixers.values() for weight in mixer.parameters()]
    optimizer = torch.optim.Adam(weights)
    for step, row in enumerate(track(rows, "matching the new mixers to the old ones")):
        calls = read_mixers(model, row, [*mixers])
        optimizer.zero_grad()
        for layer, call in calls.items():
            y, _ = mixers[layer](call.x, call.positions, None)
            error = (y - call.y).float().square().sum() / call.y.float().square().sum().clamp_min(1e-30)
            error.backward()
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / len(rows))
        optimizer.step()
        torch.clear_autocast_cache()


class LeastSquares:
    """The sums of a linear regression, in float64."""

    def __init__(self) -> None:
        self.products: Tensor | None = None
        self.targets: Tensor | None = None

    def add(self, features: Float[Tensor, "N F"], targets: Float[Tensor, "N D"]) -> None:
        """Counts N tokens."""
        features, targets = features.double(), targets.double()
        products, sums = features.mT @ features, features.mT @ targets
        self.products = products if self.products is None else self.products + products
        self.targets = sums if self.targets is None else self.targets + sums

    def solve(self) -> Float[Tensor, "F D"]:
        """W of the least sum of |f W - t|^2 + lambda |W|^2."""
        assert self.products is not None
        assert self.targets is not None
        penalty = RIDGE * self.products.diagonal().mean() + 1e-12
        identity = torch.eye(len(self.products), dtype=torch.float64, device=self.products.device)
        return torch.linalg.solve(self.products + penalty * identity, self.targets).float()
