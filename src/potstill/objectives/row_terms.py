"""Terms that are sums over the student's rows. The terms of all objectives share one pass over its head."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.errors import UnsupportedModel
from potstill.core.types import DIVISOR, NEXT_TOKEN_LOG_P, Batch, Head, Objective, Signals, Terms, supervised_positions
from potstill.ops import coarse, fused
from potstill.ops.coarse import CoarseDistribution
from potstill.ops.layout import apply_padded
from potstill.ops.precision import get_product_dtype, upcast
from potstill.ops.row_loss import RowInput, RowLoss
from potstill.ops.row_spans import LikelihoodInputs

CHUNK = 256  # rows whose logits are alive at once while log-probabilities are computed
RowInputFn = Callable[[int, int], RowInput]  # (start, stop) -> the input of these rows


class RowTerm(NamedTuple):
    """A `loss` to be summed over the student's supervised rows, and its inputs by name.

    `likelihoods` gives further inputs, from the log-probabilities of several rows. Terms of one objective share it.
    """

    loss: RowLoss
    inputs: Mapping[str, RowInputFn] = {}
    likelihoods: LikelihoodInputs | None = None


@runtime_checkable
class RowObjective(Objective, Protocol):
    """An objective with terms over the student's rows; `compute_terms` computes them together with other
    objectives'."""

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, RowTerm], Terms]:
        """(the terms over the student's rows, not computed yet; all other terms)."""
        ...


class RowObjectiveMixin:
    """The call of a `RowObjective` on its own."""

    def __call__(
        self: RowObjective, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> Terms:
        """The sums over the batch."""
        return compute_terms([(1.0, self)], views, frozen, batch)


def compute_terms(
    objectives: Sequence[tuple[float, RowObjective]],
    views: Mapping[str, Signals],
    frozen: Mapping[str, Signals],
    batch: Batch,
) -> Terms:
    """All terms of the objectives. For the gradient of the whole loss, the fused kernel needs weights and divisors.

    Raises: UnsupportedModel if the student has no readable head.
    """
    row_terms: dict[str, RowTerm] = {}
    mix: list[float] = []
    computed_terms: dict[str, Tensor] = {}
    for weight, objective in objectives:
        new_row_terms, other_terms = objective.split(views, frozen, batch)
        row_terms |= new_row_terms
        computed_terms |= other_terms
        mix += [weight * objective.weights[name] / float(batch.get(f"{DIVISOR}.{name}", 1)) for name in new_row_terms]
    if row_terms:
        student, targets = views["student"], supervised_positions(batch)[1]
        sums = fused.sum_row_losses(
            [term.loss for term in row_terms.values()],
            student.rows,
            get_head(student, "student"),
            targets=targets,
            frozen={name: input_fn for term in row_terms.values() for name, input_fn in term.inputs.items()},
            mix=mix,
            likelihoods=list(dict.fromkeys(term.likelihoods for term in row_terms.values() if term.likelihoods)),
        )
        computed_terms |= zip(row_terms, sums, strict=True)
    return computed_terms


def get_head(signals: Signals, name: str) -> Head:
    """The head of a live model.

    Raises: UnsupportedModel if it has no readable head.
    """
    if signals.head is None:
        raise UnsupportedModel(
            f"the {name}'s head is not a plain linear layer that potstill can read; choose another model"
        )
    return signals.head


def get_frozen_head(signals: Signals, name: str) -> Head:
    """The head of a model as a constant, in the dtype of the products with its rows.

    Raises: UnsupportedModel if there is no readable head.
    """
    head = get_head(signals, name).detach()
    return head._replace(weight=head.weight.to(get_product_dtype(signals.rows)))


def make_logits_fn(signals: Signals) -> RowInputFn:
    """A function that gives the logits of rows `start` to `stop`."""
    return lambda start, stop: signals.logits(signals.rows[start:stop])


def compute_target_log_probs(
    signals: Signals,
    targets: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    units: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, " N"]:
    """log p(target) of each row at the temperature, a few rows at a time.

    Partial distributions have the temperature already. A server gives the target's log-probability, at temperature 1.
    With the `units` of a student's pass over its head, an equal network gives the same numbers, bit by bit.
    """
    if NEXT_TOKEN_LOG_P in signals.scores:
        return signals.scores[NEXT_TOKEN_LOG_P]
    if signals.head is not None and temperature == 1:
        return fused.compute_log_likelihoods(signals.rows, signals.head, targets, units=units)
    parts = []
    for states, ids in zip(signals.rows.split(CHUNK), targets.split(CHUNK), strict=True):
        logits = signals.logits(states)
        if isinstance(logits, CoarseDistribution):
            parts.append(coarse.token_log_prob(logits, ids))
            continue
        wide_logits = upcast(logits) / temperature
        parts.append(wide_logits.gather(-1, ids[:, None])[:, 0] - wide_logits.logsumexp(-1))
    return torch.cat(parts)


def make_head_logits_fn(head: Head, states: Float[Tensor, "N F"]) -> Callable[[int, int], Tensor]:
    """A function that gives the logits of rows `start` to `stop` of the states through `head`."""
    return lambda start, stop: apply_padded(head.logits, states[start:stop])


def scatter_rows(values: Tensor, indices: Int[Tensor, " P"], num_rows: int, fill_value: int) -> Tensor:
    """[N ...] with `values [P ...]` at the ascending `indices` and `fill_value` everywhere else."""
    if len(indices) == num_rows:
        return values  # the indices ascend, so they are 0 to N - 1
    scattered = values.new_full((num_rows, *values.shape[1:]), fill_value)
    scattered[indices] = values
    return scattered
