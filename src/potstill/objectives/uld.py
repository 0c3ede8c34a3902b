"""Universal Logit Distillation (ULD): compares sorted probabilities, so the models may have any two vocabularies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from potstill.core.types import Batch, Needs, Objective, Signals, Terms, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import make_row_needs, match_rows_by_index
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.row_loss import Masked
from potstill.ops.uld import ULDRows


@dataclass(frozen=True, kw_only=True)
class ULD(row_terms.RowObjectiveMixin):
    """sum over pairs of rows of tau sum_k |p_(k) - q_(k)|, p and q sorted descending, the shorter padded with zeros.

    It pairs the k-th supervised row of a document with the teacher's k-th, until one of them ends; it needs no batch
    key. Pairs drift as the tokenizations diverge. The teacher gets no gradient. `ops.uld` computes the distance and
    states the bound on its error.

    Source: Boizard et al., "Towards Cross-Tokenizer Distillation" (arXiv:2402.12030), the Universal Logit Distillation
    loss. Departs from the authors' code: it divides a sum over pairs by their number, instead of a mean of means over
    samples, and has tau.
    """

    temperature: float = 1.0
    teacher: str = "teacher"
    name: str = "uld"
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """One term with weight 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The supervised rows of each network."""
        return make_row_needs(batch, self.teacher)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of pairs."""
        return {self.name: len(match_rows_by_index(batch, self.teacher)[0])}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """tau times the distance, for each row that has a partner."""
        teacher, (student_rows, teacher_rows) = frozen[self.teacher], match_rows_by_index(batch, self.teacher)
        n, teacher_key, mask_key = len(supervised_positions(batch)[1]), f"{self.name}_teacher", f"{self.name}_mask"
        states = row_terms.scatter_rows(teacher.rows[teacher_rows], student_rows, n, 0)
        is_paired = row_terms.scatter_rows(student_rows >= 0, student_rows, n, False)
        loss = Masked(ULDRows(temperature=self.temperature, teacher=teacher_key), mask_key)
        inputs = {teacher_key: lambda a, b: teacher.logits(states[a:b]), mask_key: lambda a, b: is_paired[a:b]}
        return {self.name: row_terms.RowTerm(loss, inputs)}, {}


def uld_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits of each row."""
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 1))


@register_objective(
    "uld",
    help="Probabilities sorted by size, the k-th row of a document with the teacher's k-th (ULD).",
    cost=uld_cost,
    supports_cross_tokenizer=True,
)
def build_uld(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`ULD` at the temperature."""
    return ULD(temperature=options.temperature, name=options.name)
