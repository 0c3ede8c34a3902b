"""Distributions compared by their sorted probabilities (ULD), which needs no vocabulary in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.types import Batch, Needs, Signals, Terms, supervised
from potstill.objectives import rows
from potstill.objectives.bridge import by_place, each
from potstill.ops.row_loss import Kept
from potstill.ops.sorted_gap import SortedGapRows


@dataclass(frozen=True, kw_only=True)
class SortedGap(rows.OverRows):
    """sum over pairs of rows of tau sum_k |p_(k) - q_(k)|, p and q sorted descending, the shorter filled up with zeros.

    The k-th supervised row of a document is paired with the teacher's k-th in it, as far as both go; no batch key is
    needed. Pairs drift apart where the tokenisations do: that is the method. The teacher gets no gradient. U itself is
    in `ops.sorted_gap`, with the bound on its error.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation" (arXiv:2402.12030), the Universal Logit Distillation
    loss. Departs from the authors' code: a sum over pairs divided by their number, where the code takes a mean of means
    over samples; and tau, which there is left out.
    """

    temperature: float = 1.0
    teacher: str = "teacher"
    name: str = "uld"
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """Each network's own supervised rows."""
        return each(batch, self.teacher)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of pairs."""
        return {self.name: len(by_place(batch, self.teacher)[0])}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, rows.RowTerm], Terms]:
        """tau U of each row that has a partner."""
        teacher, (ours, theirs) = frozen[self.teacher], by_place(batch, self.teacher)
        n, told, kept = len(supervised(batch)[1]), f"{self.name}_told", f"{self.name}_kept"
        states = rows.spread(teacher.rows[theirs], ours, n, 0)
        paired = rows.spread(ours >= 0, ours, n, False)
        loss = Kept(SortedGapRows(temperature=self.temperature, teacher=told), kept)
        said = {told: lambda a, b: teacher.logits(states[a:b]), kept: lambda a, b: paired[a:b]}
        return {self.name: rows.RowTerm(loss, said)}, {}
