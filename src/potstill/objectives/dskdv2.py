"""Dual-space knowledge distillation, second version (DSKDv2), with one tokenizer or at exactly aligned tokens (ETA)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from potstill.core.types import Batch, Objective, ParamGroup, Signals
from potstill.objectives import row_terms
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.dual_space import NO_TOKEN, ArgmaxRecorder, DualSpace, DualSpaceConfig, ProjectorTargets
from potstill.objectives.model_info import PairInfo
from potstill.objectives.row_matching import AlignedRowMatcher, MatchedStates, RowMatcher
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.projection import fit_projection, inverse_gram

PROJECTOR_GROUP = ParamGroup("projectors")  # the authors' scripts: 5e-4 for both


class DSKDv2(DualSpace):
    """D(Z_t2s || Z_s) + CE(Z_t2s, y_t) + D(Z_t || Z_s2t), with y_t the teacher's likeliest token.

    P_t2s starts as W_t^T pinv(W_s^T), without bias: the teacher's logits projected onto the range of the student's
    head. Every pass computes P_s2t = W_s^T pinv(W_t^T) from the student's head; it is not trained. The first term
    counts rows where the argmax of Z_t2s is y_t; elsewhere the summand is 0 and the divisor does not change.

    `logit_scale_ratio` is the scale of the teacher's head divided by that of the student's (Cohere, Granite); both maps
    ignore a soft-cap. Across tokenizers (with `AlignedRowMatcher`) it compares the heads on `shared_token_ids [2 S]`,
    the ids of student and teacher for the same bytes. The first two terms leave out rows with a y_t outside of these.

    Source: Zhang et al., "A Dual-Space Framework for General Knowledge Distillation" (arXiv:2504.11426).
    Departs from the authors' code, which averages over the rows that agree and has no tau^2. Rows at which the student
    has no y_t count in the third term too; the code drops them from all three.

    Raises: UnsupportedModel in a call with a model without a readable head.
    """

    group: ClassVar[ParamGroup] = PROJECTOR_GROUP
    needs_teacher_argmax: ClassVar[bool] = True
    masks_disagreement = True

    def __init__(
        self,
        student_weight: Float[Tensor, "V F"],
        teacher_weight: Float[Tensor, "W D"],
        config: DualSpaceConfig | None = None,
        row_matcher: RowMatcher | None = None,
        shared_token_ids: Int[Tensor, "2 S"] | None = None,
        logit_scale_ratio: float = 1.0,
    ) -> None:
        super().__init__(config or DualSpaceConfig(name="dskdv2"), row_matcher)
        self.teacher_space_divergence, self.logit_scale_ratio = self.config.divergence, logit_scale_ratio
        num_shared = min(len(student_weight), len(teacher_weight))
        student_ids, teacher_ids = (
            torch.arange(num_shared).expand(2, -1) if shared_token_ids is None else shared_token_ids
        )
        self.to_student = nn.Parameter(
            logit_scale_ratio * fit_projection(teacher_weight[teacher_ids], student_weight[student_ids])
        )  # [D F]
        id_map = torch.full((len(teacher_weight),), NO_TOKEN)
        id_map[teacher_ids] = student_ids
        self.shared_token_ids = _Constant(torch.stack([student_ids, teacher_ids]))
        self.id_map = _Constant(id_map)  # the student's id of each of the teacher's
        self.inverse_gram = _Constant(inverse_gram(teacher_weight[teacher_ids]))

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The matched rows: of the student for the first two terms, of the teacher for the third."""
        num_student_rows, num_teacher_rows = map(len, self.bridge.match_rows(batch, self.config.teacher))
        return dict(zip(self.config.term_names, (num_student_rows, num_student_rows, num_teacher_rows), strict=True))

    def project_to_student(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        """Through the learned map, which starts at the pseudo-inverse."""
        return states @ self.to_student.to(states.dtype)

    def project_to_teacher(
        self, states: Float[Tensor, "Q F"], student: Signals, teacher: Signals
    ) -> Float[Tensor, "Q D"]:
        """Through the pseudo-inverse for the student's current head."""
        return states @ self.compute_teacher_projection(student, teacher).to(states.dtype)

    def select_targets(self, matched_states: MatchedStates, recorder: ArgmaxRecorder, batch: Batch) -> ProjectorTargets:
        """The student's id of the teacher's likeliest token, if it has one; the row matchers here pair single rows."""
        tokens = self.id_map.match_device(recorder.argmax)[recorder.argmax]
        return ProjectorTargets(tokens, tokens != NO_TOKEN)

    @torch.no_grad()
    def compute_teacher_projection(self, student: Signals, teacher: Signals) -> Float[Tensor, "F D"]:
        """P_s2t for the student's current head."""
        student_weight, teacher_weight = (
            row_terms.get_head(student, "student").weight,
            row_terms.get_head(teacher, "teacher").weight,
        )
        student_ids, teacher_ids = self.shared_token_ids.match_device(student_weight)
        return (
            fit_projection(
                student_weight[student_ids], teacher_weight[teacher_ids], self.inverse_gram.match_device(student_weight)
            )
            / self.logit_scale_ratio
        )


class _Constant:
    """A tensor that is neither trained nor saved, and moves to the device of its use."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def match_device(self, tensor: Tensor) -> Tensor:
        """The value on the device of `tensor`."""
        self.value = self.value.to(tensor.device)
        return self.value


def dskdv2_cost(inputs: CostInputs) -> ObjectiveCost:
    """`dskd_cost` at the pairs, with one trained map, and one that each pass computes."""
    student_width, teacher_width = inputs.widths
    num_shared = min(inputs.vocabularies)
    maps = 10.0 * student_width * teacher_width * inputs.aligned_rows + 2.0 * num_shared * student_width * teacher_width
    # the shared rows of both heads in float32, and the inverse Gram matrix in float64
    held_bytes = 4.0 * num_shared * (student_width + teacher_width) + 8.0 * teacher_width**2
    products = inputs.rows + 2 * inputs.aligned_rows, 3 * inputs.aligned_rows
    return ObjectiveCost(*products, maps, student_width * teacher_width, (1, 0), held_bytes)


@register_objective(
    "dskdv2",
    help="`dskd` with projectors from the heads' pseudo-inverses (DSKDv2).",
    cost=dskdv2_cost,
    takes_divergence=True,
    needs_only_last_hidden=True,
)
def build_dskdv2(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DSKDv2` row by row."""
    return DSKDv2(
        pair.student.head.weight,
        pair.teacher.head.weight,
        DualSpaceConfig.from_options(options),
        logit_scale_ratio=pair.logit_scale_ratio,
    )


@register_objective(
    "dskdv2_eta",
    help="`dskdv2` across tokenizers, at exactly aligned tokens (DSKDv2-ETA).",
    cost=dskdv2_cost,
    takes_divergence=True,
    supports_cross_tokenizer=True,
)
def build_dskdv2_eta(pair: PairInfo, options: ObjectiveOptions) -> Objective:
    """`DSKDv2` at exactly aligned tokens."""
    return DSKDv2(
        pair.student.head.weight,
        pair.teacher.head.weight,
        DualSpaceConfig.from_options(options),
        AlignedRowMatcher(),
        pair.shared_token_ids,
        pair.logit_scale_ratio,
    )
