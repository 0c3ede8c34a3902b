"""Objectives that are sums over rows: all of them that look at one student share one pass over its head."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from potstill.core.errors import UnsupportedModel
from potstill.core.types import Batch, Objective, Signals, Terms, supervised
from potstill.ops import fused


@runtime_checkable
class RowObjective(Objective, Protocol):
    """An objective with one term, the sum of `row_loss` over the supervised rows of the student."""

    @property
    def name(self) -> str: ...
    @property
    def row_loss(self) -> fused.RowLoss: ...


def terms(
    objectives: Sequence[RowObjective],
    mix: Sequence[float],
    views: Mapping[str, Signals],
    frozen: Mapping[str, Signals],
    batch: Batch,
) -> Terms:
    """One sum per objective. `mix` tells the fused kernel with which weights they will be added up."""
    student = views["student"]
    if student.head is None:
        raise UnsupportedModel(
            "the student's head is not a plain linear layer that potstill can read, so it cannot train"
        )
    sums = fused.sums(
        [objective.row_loss for objective in objectives],
        student.rows,
        student.head,
        targets=supervised(batch)[1],
        frozen={name: _logits(signal) for name, signal in frozen.items()},
        mix=mix,
    )
    return {objective.name: value for objective, value in zip(objectives, sums, strict=True)}


def _logits(signal: Signals) -> Callable[[int, int], Tensor]:
    return lambda start, stop: signal.logits(signal.rows[start:stop])
