"""What an objective computes and holds beside both networks' blocks, counted from values alone.

A product is a row times a head: 2 V D operations for V ids and a width of D. The loss of the student itself is one
product forward and one or two backward (`Workload.flops`); here is what its teacher adds, and the weights that an
objective trains beside the student. Written down by hand from `objectives/`, and held against what is built and what
torch counts by `tests/stages/test_taught.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from potstill.core.blueprint import Blueprint
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.hidden_states import parse_layer_map
from potstill.objectives.registry import LAYER_MAP_OPTION


@dataclass(frozen=True, kw_only=True)
class CostInputs:
    """Both shapes, and the rows of a pass: of the student, of the teacher, paired ones, and of a row's own document.

    `numbers` are the options of the method, `compute_bytes` an entry's in the dtype of the products.
    """

    student: Blueprint
    teacher: Blueprint
    vocabularies: tuple[int, int]
    rows: float
    teacher_rows: float
    aligned_rows: float
    document_rows: float
    options: Mapping[str, float]
    compute_bytes: int

    @property
    def widths(self) -> tuple[int, int]:
        """Of the hidden states."""
        return self.student.hidden, self.teacher.hidden


class ObjectiveCost(NamedTuple):
    """Of a pass: products with the student's head and with the teacher's, other operations; weights that are trained.

    `whole` says how many rows of logits over either vocabulary are said of each row of a chunk, `held` the bytes that
    a pass holds beside them.
    """

    student_products: float = 0.0
    teacher_products: float = 0.0
    other_operations: float = 0.0
    weights: int = 0
    logit_copies: tuple[int, int] = (0, 0)
    held_bytes: float = 0.0


def compute_objective_cost(objective: ObjectiveConfig, inputs: CostInputs) -> ObjectiveCost:
    """The share of the teacher in `mixture`; nothing where it teaches nothing."""
    if not objective.uses_teacher:
        return ObjectiveCost()
    return COST_FUNCTIONS.get(objective.name, logit_distillation_cost)(inputs)


def logit_distillation_cost(inputs: CostInputs) -> ObjectiveCost:
    """A divergence: the teacher's logits of each row."""
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 1))


def dskd_cost(inputs: CostInputs) -> ObjectiveCost:
    """Z_t2s of each row, its cross-entropy with a gradient by the row; Z_t, and Z_s2t with one. Two maps with bias."""
    student_width, teacher_width = inputs.widths
    maps = 6.0 * student_width * teacher_width * (inputs.rows + inputs.teacher_rows)
    weights = 2 * student_width * teacher_width + student_width + teacher_width
    return ObjectiveCost(3 * inputs.rows, 3 * inputs.teacher_rows, maps, weights, (1, 0))


def dskd_cma_cost(inputs: CostInputs) -> ObjectiveCost:
    """`dskd`, the query's map, and attention between the rows of a document, forward and twice back."""
    student_width, teacher_width = inputs.widths
    base_cost, document_rows = dskd_cost(inputs), inputs.document_rows * inputs.teacher_rows / inputs.rows
    query, cross_attention = (
        24.0 * student_width * teacher_width,
        6.0 * document_rows * (3 * teacher_width + student_width),
    )
    attention_operations = inputs.rows * (query + cross_attention)
    return base_cost._replace(
        other_operations=base_cost.other_operations + attention_operations,
        weights=base_cost.weights + 4 * student_width * teacher_width + 2 * teacher_width,
    )


def dskdv2_cost(inputs: CostInputs) -> ObjectiveCost:
    """`dskd` at the pairs. One map is trained, one found in each pass."""
    student_width, teacher_width = inputs.widths
    num_shared = min(inputs.vocabularies)
    maps = 10.0 * student_width * teacher_width * inputs.aligned_rows + 2.0 * num_shared * student_width * teacher_width
    held_bytes = (
        4.0 * num_shared * (student_width + teacher_width) + 8.0 * teacher_width**2
    )  # both heads' shared rows in float32; the inverse Gram
    products = inputs.rows + 2 * inputs.aligned_rows, 3 * inputs.aligned_rows
    return ObjectiveCost(*products, maps, student_width * teacher_width, (1, 0), held_bytes)


def mined_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits at the pairs, for the student's ids alone, by a copy of their part of its head."""
    head_entries = inputs.vocabularies[0] * inputs.widths[1]
    return ObjectiveCost(
        other_operations=2.0 * head_entries * inputs.aligned_rows,
        logit_copies=(2, 0),
        held_bytes=float(inputs.compute_bytes * head_entries),
    )


def spans_cost(inputs: CostInputs) -> ObjectiveCost:
    """The teacher's logits of every row, and the student's of those in runs once more."""
    return ObjectiveCost(
        student_products=inputs.rows - inputs.aligned_rows, teacher_products=inputs.teacher_rows, logit_copies=(2, 1)
    )


def hidden_states_cost(inputs: CostInputs) -> ObjectiveCost:
    """A map of each pair of layers, with both gradients."""
    student_width, teacher_width = inputs.widths
    num_layers = len(inputs.student.layers), len(inputs.teacher.layers)
    num_pairs = int(inputs.options.get(LAYER_MAP_OPTION) or min(inputs.options["layers"], *num_layers))
    return ObjectiveCost(
        other_operations=6.0 * num_pairs * student_width * teacher_width * inputs.aligned_rows,
        weights=num_pairs * student_width * teacher_width,
    )


def relations_cost(inputs: CostInputs) -> ObjectiveCost:
    """Three maps with both gradients, and the relations of each row to those of its document, of both networks."""
    relation_width = sum(inputs.teacher.layers[-1].mixer.projection_widths().values())
    document_rows = inputs.document_rows * inputs.aligned_rows / inputs.rows
    return ObjectiveCost(
        other_operations=inputs.aligned_rows * relation_width * (6.0 * inputs.student.hidden + 8.0 * document_rows),
        weights=inputs.student.hidden * relation_width,
    )


COST_FUNCTIONS: Mapping[str, Callable[[CostInputs], ObjectiveCost]] = MappingProxyType(
    {
        "dskd": dskd_cost,
        "dskd_cma": dskd_cma_cost,
        "dskdv2": dskdv2_cost,
        "dskdv2_eta": dskdv2_cost,
        "mined": mined_cost,
        "spans": spans_cost,
        "hidden": hidden_states_cost,
        "relations": relations_cost,
    }
)


def get_numeric_options(objective: ObjectiveConfig) -> dict[str, float]:
    """The numbers of a method, and of a map of layers how many pairs it has."""
    map_options = (
        {LAYER_MAP_OPTION: float(len(parse_layer_map(str(objective.options[LAYER_MAP_OPTION]))))}
        if LAYER_MAP_OPTION in objective.options
        else {}
    )
    return {**objective.numeric_options, **map_options}
