"""Spans of rows that a pass over a head computes together, and inputs that need the likelihoods of several rows.

A loss of a whole sequence is a function of the sum of log q(target) over its rows. Its derivative by each row's
log q(target) is known only after the last of these rows. So rows that belong together, a unit, lie in one span. As many
units as fit into a chunk make a span, and then no logits are computed twice. A longer unit is a span of its own.

Source: the definition, by the chain rule. `ops.row_loss.Tangent` is the row loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Span = tuple[int, int]  # the first row, and the row after the last


@dataclass(frozen=True, eq=False)
class LikelihoodInputs:
    """Inputs of row losses that are a function of log q(target) of all rows of a unit.

    Attributes:
        units: the number of the unit of each row, ascending.
        compute: gives the inputs of the rows of a span by name, from its first row and log q(target) of its rows.
    """

    units: Int[Tensor, " N"]
    compute: Callable[[int, Float[Tensor, " C"]], Mapping[str, Tensor]]


def number_units(sets: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The units of rows that belong to sets, -1 for none: all rows from the first to the last one of a set.

    Sets that overlap make one unit. A row outside of them is a unit of its own.
    """
    members = (sets >= 0).nonzero()[:, 0]
    numbers, index = torch.unique(sets[members], return_inverse=True)
    first = members.new_full((len(numbers),), len(sets)).scatter_reduce(0, index, members, "amin")
    last = members.new_zeros(len(numbers)).scatter_reduce(0, index, members, "amax")
    change = torch.zeros(len(sets) + 1, dtype=torch.long, device=sets.device)
    change = change.index_add(0, first + 1, torch.ones_like(first)).index_add(0, last + 1, -torch.ones_like(last))
    is_inside = change.cumsum(0)[: len(sets)] > 0  # the row is in the unit of the row before it
    return (~is_inside).cumsum(0) - 1


def plan_spans(num_rows: int, chunk: int, inputs: Sequence[LikelihoodInputs]) -> list[Span]:
    """Ascending spans over all rows: chunks, or, with `inputs`, whole units that fit a chunk, or one longer unit."""
    if not inputs:
        return [(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk)]
    spans, start, border = [], 0, 0
    for next_border in [*_list_borders([source.units for source in inputs]), num_rows]:
        if next_border - start > chunk and border > start:
            spans.append((start, border))
            start = border
        border = next_border
    return [*spans, (start, num_rows)] if num_rows > start else spans


def _list_borders(units: Sequence[Int[Tensor, " N"]]) -> list[int]:
    """The rows at which a new unit begins in every numbering, without the first row."""
    is_border: Bool[Tensor, " N"] = torch.stack([numbers[1:] != numbers[:-1] for numbers in units]).all(0)
    borders: list[int] = (is_border.nonzero()[:, 0] + 1).tolist()
    return borders


def split_span(span: Span, chunk: int) -> Iterator[Span]:
    """The chunks of a span."""
    start, stop = span
    return ((first, min(first + chunk, stop)) for first in range(start, stop, chunk))
