"""What is said of some rows and not of others, as a teacher says it that was asked about its own documents alone.

Source: the definition.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from potstill.ops.coarse import Coarse


@dataclass(frozen=True)
class Partial:
    """What is said of some of C rows: `places[c]` is the number in `said` of what is said of row c, -1 for nothing.

    `said` is in the order of the rows and holds no others.
    """

    said: Tensor | Coarse
    places: Int[Tensor, " C"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: slice) -> "Partial":
        before, some = int((self.places[: rows.start] >= 0).sum()), self.places[rows]
        told = self.said[before : before + int((some >= 0).sum())]
        return Partial(told, torch.where(some >= 0, some - before, -1))
