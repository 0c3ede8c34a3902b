"""The hard-label loss of language modeling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.types import Batch, Needs, Signals, Terms, gold_mask, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.cost import no_cost
from potstill.objectives.spec import ObjectiveSpec
from potstill.ops.row_loss import CrossEntropyRows, Weighted

CROSS_ENTROPY = "cross_entropy"
GOLD_KEY = "gold"  # the name under which the row loss gets the weights of the rows


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(row_terms.RowObjectiveMixin):
    """sum over supervised positions of -log q(next token), in nats; q is the student.

    Text that a model sampled in this run (`sampled` in the batch) is not ground truth: the loss neither sums nor counts
    it.

    Source: the definition.
    """

    name: str = CROSS_ENTROPY
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """One term with weight 1."""
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


CROSS_ENTROPY_SPEC = ObjectiveSpec(
    name=CROSS_ENTROPY,
    help="The next token of the data; no teacher.",
    build=lambda pair, options: CrossEntropy(),
    cost=no_cost,
    uses_teacher=False,
    needs_teacher_model=False,
    supports_cross_tokenizer=True,
)
