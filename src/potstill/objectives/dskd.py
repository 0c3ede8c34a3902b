"""Dual-space knowledge distillation, first version (DSKD), with one tokenizer or by cross-model attention."""

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from potstill.core.types import Batch, Objective, ParamGroup, Signals, gold_mask, supervised_positions
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.dual_space import ArgmaxRecorder, DualSpace, DualSpaceConfig, ProjectorTargets
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import CrossModelAttention, MatchedStates, RowMatcher
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.divergence import forward_kl

PROJECTOR_GROUP = ParamGroup("projectors", rate=2.0)  # the authors' scripts: 1e-3 with 5e-4 for the student


class DSKD(DualSpace):
    """D(Z_t2s || Z_s) + CE(Z_t2s, y) + KL(Z_t || Z_s2t), with y the text's next token.

    P_t2s and P_s2t are linear maps with bias in PyTorch's default initialization. The teacher's space uses forward KL
    under every divergence. Across tokenizers (with `CrossModelAttention`) the first term counts only rows where the
    argmax of Z_t2s is y. Elsewhere the summand is 0 and the divisor does not change.

    Source: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models" (arXiv:2406.17328), section 3.
    Departs from the authors' code: it leaves out tau^2, and it divides the sum over the teacher's rows by the number of
    the student's rows.

    Raises: UnsupportedModel in a call with a model without a readable head.
    """

    group: ClassVar[ParamGroup] = PROJECTOR_GROUP

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        config: DualSpaceConfig | None = None,
        row_matcher: RowMatcher | None = None,
    ) -> None:
        super().__init__(config or DualSpaceConfig(), row_matcher)
        self.teacher_space_divergence, self.masks_disagreement = (
            forward_kl,
            isinstance(row_matcher, CrossModelAttention),
        )
        self.to_student = nn.Linear(teacher_width, student_width)
        self.to_teacher = nn.Linear(student_width, teacher_width)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The matched rows: of the student, of the student within the data's own text, and of the teacher."""
        student_rows, teacher_rows = self.bridge.match_rows(batch, self.config.teacher)
        return dict(
            zip(
                self.config.term_names,
                (len(student_rows), int(gold_mask(batch)[student_rows].sum()), len(teacher_rows)),
                strict=True,
            )
        )

    def project_to_student(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        """Through a learned map."""
        projected_states: Tensor = self.to_student(states)
        return projected_states

    def project_to_teacher(
        self, states: Float[Tensor, "Q F"], student: Signals, teacher: Signals
    ) -> Float[Tensor, "Q D"]:
        """Through a learned map."""
        projected_states: Tensor = self.to_teacher(states)
        return projected_states

    def select_targets(self, matched_states: MatchedStates, recorder: ArgmaxRecorder, batch: Batch) -> ProjectorTargets:
        """The text's next token; tokens that the student sampled train no projector."""
        return ProjectorTargets(
            supervised_positions(batch)[1][matched_states.student_rows], gold_mask(batch)[matched_states.student_rows]
        )


def dskd_cost(inputs: CostInputs) -> ObjectiveCost:
    """Z_t2s of each row, its cross-entropy with gradient; Z_t; Z_s2t with gradient; two maps with bias."""
    student_width, teacher_width = inputs.widths
    maps = 6.0 * student_width * teacher_width * (inputs.rows + inputs.teacher_rows)
    weights = 2 * student_width * teacher_width + student_width + teacher_width
    return ObjectiveCost(3 * inputs.rows, 3 * inputs.teacher_rows, maps, weights, (1, 0))


def dskd_cma_cost(inputs: CostInputs) -> ObjectiveCost:
    """`dskd_cost`, the query's map, and attention between the rows of a document, forward and two backward products."""
    student_width, teacher_width = inputs.widths
    base_cost, document_rows = dskd_cost(inputs), inputs.document_rows * inputs.teacher_rows / inputs.rows
    query = 24.0 * student_width * teacher_width
    cross_attention = 6.0 * document_rows * (3 * teacher_width + student_width)
    return base_cost._replace(
        other_operations=base_cost.other_operations + inputs.rows * (query + cross_attention),
        weights=base_cost.weights + 4 * student_width * teacher_width + 2 * teacher_width,
    )


@register_objective(
    "dskd",
    help="Both models' distributions from one head, in the space of either (DSKD).",
    cost=dskd_cost,
    takes_divergence=True,
    needs_only_last_hidden=True,
)
def build_dskd(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DSKD` row by row."""
    return DSKD(pair.student.hidden_size, pair.teacher.hidden_size, DualSpaceConfig.from_options(options))


@register_objective(
    "dskd_cma",
    help="`dskd` across tokenizers, by attention between the two tokenizations (DSKD-CMA).",
    cost=dskd_cma_cost,
    takes_divergence=True,
    supports_cross_tokenizer=True,
)
def build_dskd_cma(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DSKD` by cross-model attention."""
    student, teacher = pair.student, pair.teacher
    row_matcher = CrossModelAttention(
        student.hidden_size, teacher.hidden_size, embedding_std=teacher.compute_embedding_std()
    )
    return DSKD(student.hidden_size, teacher.hidden_size, DualSpaceConfig.from_options(options), row_matcher)
