"""The cost of an objective, computed from sizes alone: the inputs of its cost function and the result.

One product multiplies one row of hidden states by a head: 2 V D operations for V token ids and width D. The student's
own loss (one product forward, one or two backward) is counted by `Workload.flops`. A cost function counts the
additional cost of the objective. Each objective's file has its cost function. The tests compare it with the parameters
of the built objective and with PyTorch's FLOP counter.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from potstill.core.blueprint import Blueprint


@dataclass(frozen=True, kw_only=True)
class CostInputs:
    """Sizes of both models and the number of rows in one pass.

    Attributes:
        vocabularies: token ids of the student and of the teacher.
        rows: supervised rows of the student.
        teacher_rows: supervised rows of the teacher.
        aligned_rows: paired rows across the two tokenizers.
        document_rows: mean number of rows in the document of a row, itself included.
        options: the options of the objective, with its defaults.
        compute_bytes: bytes per entry in the dtype of the matrix products.
    """

    student: Blueprint
    teacher: Blueprint
    vocabularies: tuple[int, int]
    rows: float
    teacher_rows: float
    aligned_rows: float
    document_rows: float
    options: Mapping[str, float | str] = field(default_factory=dict)
    compute_bytes: int

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of the student's and the teacher's hidden states."""
        return self.student.hidden, self.teacher.hidden


class ObjectiveCost(NamedTuple):
    """The additional cost of an objective in one pass.

    Attributes:
        student_products: products with the student's head.
        teacher_products: products with the teacher's head.
        other_operations: all other floating-point operations.
        weights: trainable weights in addition to the student's.
        logit_copies: rows of logits that are alive for each row of a chunk, over the student's and the teacher's ids.
        held_bytes: bytes that the pass needs in addition to these logits.
    """

    student_products: float = 0.0
    teacher_products: float = 0.0
    other_operations: float = 0.0
    weights: int = 0
    logit_copies: tuple[int, int] = (0, 0)
    held_bytes: float = 0.0


CostFunction = Callable[[CostInputs], ObjectiveCost]


def no_cost(inputs: CostInputs) -> ObjectiveCost:
    """The cost of an objective with no considerable cost over the student's own loss."""
    return ObjectiveCost()


def sum_costs(costs: Iterable[ObjectiveCost]) -> ObjectiveCost:
    """The cost of several objectives together. It is an upper bound, because terms may share the teacher's logits."""
    total = ObjectiveCost()
    for cost in costs:
        total = ObjectiveCost(
            total.student_products + cost.student_products,
            total.teacher_products + cost.teacher_products,
            total.other_operations + cost.other_operations,
            total.weights + cost.weights,
            (total.logit_copies[0] + cost.logit_copies[0], total.logit_copies[1] + cost.logit_copies[1]),
            total.held_bytes + cost.held_bytes,
        )
    return total
