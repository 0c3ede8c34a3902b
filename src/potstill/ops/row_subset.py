"""What is said of some rows and not of others, as a teacher says it that was asked about its own documents alone.

Source: the definition.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution


@dataclass(frozen=True)
class RowSubset:
    """What is said of some of C rows: `places[c]` is the number in `said` of what is said of row c, -1 for nothing.

    `said` is in the order of the rows and holds no others.
    """

    values: Tensor | CoarseDistribution
    places: Int[Tensor, " C"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice) -> "RowSubset":
        offset, places = int((self.places[: rows.start] >= 0).sum()), self.places[rows]
        values = self.values[offset : offset + int((places >= 0).sum())]
        return RowSubset(values, torch.where(places >= 0, places - offset, -1))
