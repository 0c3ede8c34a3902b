"""Terms that are sums over the student's rows: all of them, whoever asks for them, share one pass over its head."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.errors import UnsupportedModel
from potstill.core.types import DIVISOR, OWN, Batch, Head, Objective, Signals, Terms, supervised
from potstill.ops import coarse, fused
from potstill.ops.coarse import Coarse
from potstill.ops.layout import through
from potstill.ops.row_loss import RowLoss, Said

CHUNK = 256  # rows whose logits are alive at once, where all that is asked of them is one number each
Telling = Callable[[int, int], Said]  # what is said of rows a to b


class RowTerm(NamedTuple):
    """`loss` summed over the student's supervised rows, and what it is told of them, by name."""

    loss: RowLoss
    said: Mapping[str, Telling] = {}


@runtime_checkable
class RowObjective(Objective, Protocol):
    """An objective of which some terms are sums over the student's rows, to be computed with those of others."""

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, RowTerm], Terms]:
        """(the terms over the student's rows, yet to be computed; all other terms)."""
        ...


class OverRows:
    """The call of a `RowObjective` by itself, which is a sum of no other."""

    def __call__(
        self: RowObjective, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> Terms:
        """The sums over the batch."""
        return terms([(1.0, self)], views, frozen, batch)


def terms(
    objectives: Sequence[tuple[float, RowObjective]],
    views: Mapping[str, Signals],
    frozen: Mapping[str, Signals],
    batch: Batch,
) -> Terms:
    """All terms of the objectives. Weights and divisors tell the fused kernel how the terms will be added up.

    Raises: UnsupportedModel for a student whose head cannot be read.
    """
    asked: dict[str, RowTerm] = {}
    mix: list[float] = []
    done: dict[str, Tensor] = {}
    for weight, objective in objectives:
        over_rows, others = objective.split(views, frozen, batch)
        asked |= over_rows
        done |= others
        mix += [weight * objective.weights[name] / float(batch.get(f"{DIVISOR}.{name}", 1)) for name in over_rows]
    if asked:
        student, targets = views["student"], supervised(batch)[1]
        sums = fused.sums(
            [term.loss for term in asked.values()],
            student.rows,
            head_of(student, "student"),
            targets=targets,
            frozen={name: telling for term in asked.values() for name, telling in term.said.items()},
            mix=mix,
        )
        done |= zip(asked, sums, strict=True)
    return done


def head_of(signals: Signals, name: str) -> Head:
    """The head of a live network.

    Raises: UnsupportedModel where there is none that can be read.
    """
    if signals.head is None:
        raise UnsupportedModel(
            f"the {name}'s head is not a plain linear layer that potstill can read here; choose a model with one, alive"
        )
    return signals.head


def frozen_head(signals: Signals, name: str) -> Head:
    """The head of a network as a constant, in the dtype that products of its rows are computed in.

    Raises: UnsupportedModel where it cannot be read.
    """
    head = head_of(signals, name).constant()
    return head._replace(weight=head.weight.to(fused.compute_dtype(signals.rows)))


def logits_of(signals: Signals) -> Telling:
    """The logits of rows a to b."""
    return lambda start, stop: signals.logits(signals.rows[start:stop])


def log_chance(signals: Signals, targets: Int[Tensor, " N"], *, temperature: float = 1.0) -> Float[Tensor, " N"]:
    """log p(target) of each row at that temperature, a few rows at a time.

    What is known in part was read at the temperature already; a server tells the target's own, at 1.
    """
    if OWN in signals.scores:
        return signals.scores[OWN]
    parts = []
    for some, ids in zip(signals.rows.split(CHUNK), targets.split(CHUNK), strict=True):
        said = signals.logits(some)
        if isinstance(said, Coarse):
            parts.append(coarse.log_chance(said, ids))
            continue
        wide = said.to(torch.promote_types(said.dtype, torch.float32)) / temperature
        parts.append(wide.gather(-1, ids[:, None])[:, 0] - wide.logsumexp(-1))
    return torch.cat(parts)


def telling(head: Head, states: Float[Tensor, "N F"]) -> Callable[[int, int], Tensor]:
    """The logits that `head` gives for the states of rows a to b."""
    return lambda start, stop: through(head.logits, states[start:stop])


def spread(values: Tensor, places: Int[Tensor, " P"], rows: int, otherwise: int) -> Tensor:
    """[N ...] with `values [P ...]` at their places and `otherwise` everywhere else."""
    if len(places) == rows:
        return values  # ascending places: each row is its own
    found = values.new_full((rows, *values.shape[1:]), otherwise)
    found[places] = values
    return found
