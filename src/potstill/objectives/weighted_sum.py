"""Weighted sums of objectives."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

from torch import nn

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Objective, Signals, Terms, select_needed_rows
from potstill.objectives import row_terms


class WeightedSum(nn.Module):
    """sum_i w_i L_i. Each L_i keeps its own terms, counts and divisor; all terms over rows share one pass of the head.

    `WeightedSum((0.5, CrossEntropy()), (0.5, LogitDistillation()))` is the loss of MiniMA (arXiv:2311.07052) and DSKD.
    It is a module, so that the parameters of its parts (projectors) are trained and saved.

    Raises: UsageError if two terms have the same name, a weight is negative or not finite, or there is no part.
    """

    def __init__(self, *parts: tuple[float, Objective]) -> None:
        super().__init__()
        self.parts: Sequence[tuple[float, Objective]] = parts
        self.trained = nn.ModuleList(part for _, part in parts if isinstance(part, nn.Module))
        names = Counter(name for _, part in parts for name in part.weights)
        if duplicates := [name for name, n in names.items() if n > 1]:
            raise UsageError(f"two objectives have a term {duplicates[0]!r}; give one of them another name")
        if not parts:
            raise UsageError("a sum without objectives trains nothing; give at least one objective")
        if invalid_weights := [weight for weight, _ in parts if not 0 <= weight < math.inf]:
            raise UsageError(f"the weight of an objective is {invalid_weights[0]}; choose a finite number, 0 or more")

    @property
    def additive(self) -> bool:
        """Whether every part is a sum over rows."""
        return all(part.additive for _, part in self.parts)

    @property
    def weights(self) -> Mapping[str, float]:
        """w_i times the part's own weights."""
        return {name: w * part_weight for w, part in self.parts for name, part_weight in part.weights.items()}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The union of what the parts need, model by model."""
        return _unite_needs([part for _, part in self.parts], batch)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The counts of all parts."""
        return {name: n for _, part in self.parts for name, n in part.counts(batch).items()}

    def forward(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """All terms, unweighted. Each part gets the rows at its own positions."""
        row_objectives = [(w, part) for w, part in self.parts if isinstance(part, row_terms.RowObjective)]
        other_objectives = [part for _, part in self.parts if not isinstance(part, row_terms.RowObjective)]
        signals, united = (views, frozen), self.needs(batch) if len(self.parts) > 1 else {}
        row_needs = _unite_needs([part for _, part in row_objectives], batch) if united and other_objectives else {}
        row_views, row_frozen = (_select_rows(networks, united, row_needs) for networks in signals)
        terms = dict(row_terms.compute_terms(row_objectives, row_views, row_frozen, batch))
        for part in other_objectives:
            needs = part.needs(batch) if united else {}
            part_views, part_frozen = (_select_rows(networks, united, needs) for networks in signals)
            terms |= part(part_views, part_frozen, batch)
        return terms


def _unite_needs(parts: Sequence[Objective], batch: Batch) -> dict[str, Needs]:
    """The union of the parts' needs by network."""
    needs_by_network: dict[str, list[Needs]] = {}
    for part in parts:
        for network, needs in part.needs(batch).items():
            needs_by_network.setdefault(network, []).append(needs)
    return {network: reduce(or_, needs) for network, needs in needs_by_network.items()}


def _select_rows(
    signals: Mapping[str, Signals], united: Mapping[str, Needs], needs: Mapping[str, Needs]
) -> Mapping[str, Signals]:
    """Signals at the needed positions, where they were computed for the union of several parts' needs."""
    return {
        name: select_needed_rows(network, united[name], needs[name]) if name in needs else network
        for name, network in signals.items()
    }
