"""The hard-label loss of language modelling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.types import Batch, Needs, Signals, Terms, gold_mask, supervised_positions
from potstill.objectives import row_terms
from potstill.ops.row_loss import CrossEntropyRows, Weighted

GOLD_KEY = "gold"  # by what name the row loss hears of which rows count


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(row_terms.RowObjectiveMixin):
    """sum over supervised positions of -log q(next token), in nats; q is the student.

    What a model wrote in this run (`sampled` in the batch) is no truth, and is neither summed nor counted.

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
        return {"student": Needs(supervised_positions(batch)[0])}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """-log q(target) of each row."""
        if "sampled" not in batch:
            return {self.name: row_terms.RowTerm(CrossEntropyRows())}, {}
        gold_weights = gold_mask(batch).to(views["student"].rows.dtype)
        term = row_terms.RowTerm(
            Weighted(CrossEntropyRows(), GOLD_KEY), {GOLD_KEY: lambda start, stop: gold_weights[start:stop]}
        )
        return {self.name: term}, {}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of supervised positions that come from the data."""
        return {self.name: int(gold_mask(batch).sum())}
