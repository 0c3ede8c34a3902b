"""Inputs of a row loss that exist for some rows only, such as the logits of a teacher for its own documents.

Source: the definition.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution


@dataclass(frozen=True)
class RowSubset:
    """Inputs for some of C rows: `places[c]` is the index in `values` of the input of row c, -1 if it has none.

    `values` has the order of the rows, and only theirs.
    """

    values: Tensor | CoarseDistribution
    places: Int[Tensor, " C"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice) -> "RowSubset":
        offset, places = int((self.places[: rows.start] >= 0).sum()), self.places[rows]
        values = self.values[offset : offset + int((places >= 0).sum())]
        return RowSubset(values, torch.where(places >= 0, places - offset, -1))
