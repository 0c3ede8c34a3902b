"""The hard-label loss of language modelling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.types import Batch, Needs, Signals, Terms, supervised
from potstill.objectives import rows
from potstill.ops.row_loss import CrossEntropyRows


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """sum over supervised positions of -log q(next token), in nats; q is the student.

    Source: the definition.
    """

    name: str = "cross_entropy"
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The student's rows."""
        return {"student": Needs(supervised(batch)[0])}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, rows.RowTerm], Terms]:
        """-log q(target) of each row."""
        return {self.name: rows.RowTerm(CrossEntropyRows())}, {}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of supervised positions."""
        return {self.name: len(supervised(batch)[1])}

    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """The sum over the batch."""
        return rows.terms([(1.0, self)], views, frozen, batch)
