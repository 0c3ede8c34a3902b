"""Dual-space distillation: both distributions come from one head, once the student's and once the teacher's.

    Z_t2s = P_t2s(H_t) W_s^T    the teacher's hidden states [N D] through the student's head, [N V_s]
    Z_s2t = P_s2t(H_s) W_t^T    the student's hidden states [M d] through the teacher's head, [M V_t]

Hidden states are those after the final norm; a bridge (`objectives.bridge`) brings them to the other network's rows.
Heads are constants here: the student's own is trained by the terms over its own logits alone. The projectors are
trained with the student and thrown away at the end.

| term | gradient goes to |
|---|---|
| student space: D(sg Z_t2s, Z_s) | the student, its head included |
| projector: CE(Z_t2s, label) | P_t2s and the bridge |
| teacher space: D(Z_t, Z_s2t) | the student's body, P_s2t and the bridge |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from potstill.core.types import Batch, Head, Needs, ParamGroup, Signals, Terms, gold_mask, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.row_matching import CrossModelAttention, MatchedStates, RowMatcher, SameRowMatcher
from potstill.ops import fused
from potstill.ops.divergence import Divergence, forward_kl
from potstill.ops.layout import apply_padded
from potstill.ops.projection import fit_projection, inverse_gram
from potstill.ops.row_loss import CrossEntropyRows, DivergenceRows, RowLoss, WhereArgmaxIs

PROJECTOR_GROUP_V1 = ParamGroup(
    "projectors", rate=2.0
)  # 1e-3 beside the student's 5e-4, as in the scripts of the first version
PROJECTOR_GROUP_V2 = ParamGroup("projectors")  # 5e-4 both, as in those of the second
NO_TOKEN = -1  # in place of a token id: this row has no counterpart


@dataclass(frozen=True, kw_only=True)
class DualSpaceConfig:
    """How the two spaces are compared: by `divergence` at temperature tau, times tau^2 as in `objectives.distill`.

    `name` opens the names of the terms.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    teacher: str = "teacher"
    name: str = "dskd"

    @property
    def term_names(self) -> tuple[str, str, str]:
        """The student's space, what trains P_t2s, and the teacher's space."""
        return f"{self.name}_student_space", f"{self.name}_projector", f"{self.name}_teacher_space"

    @property
    def projected_key(self) -> str:
        """By what name a row loss hears of Z_t2s."""
        return f"{self.name}_projected"

    @property
    def label_key(self) -> str:
        """By what name a row loss hears of the token that Z_t2s has to prefer."""
        return f"{self.name}_label"


class ProjectorTargets(NamedTuple):
    """The token that Z_t2s has to prefer at each row that is reached, and at which of them it is learnt."""

    tokens: Int[Tensor, " P"]
    is_trained: Bool[Tensor, " P"]


class DualSpaceBase(nn.Module):
    """What both versions share: three terms, each weighing 1, from the same rows, heads and projected states.

    A version says how states get to the other width, which token Z_t2s has to prefer, whether that is one that the
    teacher finds likeliest (`hears`), whether the first term counts only where it does (`agreeing`), and by what the
    teacher's space is compared (`inside`).
    """

    additive: ClassVar[bool] = True
    needs_teacher_argmax: ClassVar[bool] = False
    masks_disagreement: bool
    teacher_space_divergence: Divergence

    def __init__(self, config: DualSpaceConfig, bridge: RowMatcher | None) -> None:
        super().__init__()
        self.config, self.bridge = config, bridge or SameRowMatcher()

    @property
    def weights(self) -> Mapping[str, float]:
        """Three terms, each weighing 1."""
        return dict.fromkeys(self.config.term_names, 1.0)

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """What the bridge needs of student and teacher."""
        return self.bridge.needs(batch, self.config.teacher)

    def project_to_student(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        """The teacher's states in the student's space, by P_t2s."""
        raise NotImplementedError

    def project_to_teacher(
        self, states: Float[Tensor, "Q F"], student: Signals, teacher: Signals
    ) -> Float[Tensor, "Q D"]:
        """The student's states in the teacher's space, by P_s2t."""
        raise NotImplementedError

    def select_targets(
        self, matched_states: MatchedStates, recorder: "ArgmaxRecorder", batch: Batch
    ) -> ProjectorTargets:
        """Which token Z_t2s has to prefer; `said` is what the teacher has said in its own space."""
        raise NotImplementedError

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """The term in the student's space, over its rows, and the two others."""
        config, n = self.config, len(supervised_positions(batch)[1])
        student, teacher = views["student"], frozen[config.teacher]
        student_head, teacher_head = (
            row_terms.get_frozen_head(student, "student"),
            row_terms.get_frozen_head(teacher, "teacher"),
        )
        matched_states = self.bridge(student, teacher, batch, config.teacher)
        states_in_teacher_space = apply_padded(
            lambda states: self.project_to_teacher(states, student, teacher), matched_states.states_for_teacher
        )
        recorder = ArgmaxRecorder(
            teacher_head, teacher.rows[matched_states.teacher_rows], records_argmax=self.needs_teacher_argmax
        )
        teacher_space_loss = compute_teacher_space_loss(
            self.teacher_space_divergence, config, states_in_teacher_space, teacher_head, recorder
        )
        tokens, is_trained = self.select_targets(matched_states, recorder, batch)
        states_in_student_space = apply_padded(self.project_to_student, matched_states.states_for_student)
        projected_rows = row_terms.scatter_rows(states_in_student_space.detach(), matched_states.student_rows, n, 0)
        labels = row_terms.scatter_rows(tokens, matched_states.student_rows, n, NO_TOKEN)
        inputs = {
            config.projected_key: row_terms.make_head_logits_fn(student_head, projected_rows),
            config.label_key: lambda a, b: labels[a:b],
        }
        loss: Any = DivergenceRows(config.divergence, temperature=config.temperature, teacher=config.projected_key)
        if self.masks_disagreement:
            loss = WhereArgmaxIs(loss, source=config.projected_key, choice=config.label_key)
        student_term, projector_term, teacher_term = config.term_names
        return {student_term: row_terms.RowTerm(loss, inputs)}, {
            projector_term: sum_row_loss(
                CrossEntropyRows(), states_in_student_space[is_trained], student_head, tokens[is_trained]
            ),
            teacher_term: teacher_space_loss,
        }

    forward = row_terms.RowObjectiveMixin.__call__


class DualSpace(DualSpaceBase):
    """D(Z_t2s || Z_s) + CE(Z_t2s, y) + KL(Z_t || Z_s2t), with y the text's next token.

    P_t2s and P_s2t are linear maps with bias, as torch draws them. The teacher's space is compared by forward KL
    whatever the divergence. Across tokenizers (`bridge` a `CrossAttention`) the first term counts only where Z_t2s
    prefers y; where it does not, the summand is 0 and the divisor stays.

    Source: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models" (arXiv:2406.17328), section 3.
    Departs from the authors' code: tau^2, which there is left out; the teacher's space is averaged over the teacher's
    rows, where the code divides by the student's.

    Raises: UnsupportedModel when called with a network whose head cannot be read.
    """

    group: ClassVar[ParamGroup] = PROJECTOR_GROUP_V1

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        config: DualSpaceConfig | None = None,
        bridge: RowMatcher | None = None,
    ) -> None:
        super().__init__(config or DualSpaceConfig(), bridge)
        self.teacher_space_divergence, self.masks_disagreement = forward_kl, isinstance(bridge, CrossModelAttention)
        self.to_student = nn.Linear(teacher_width, student_width)
        self.to_teacher = nn.Linear(student_width, teacher_width)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The rows that are reached: of the student, of it where the text is the data's own, and of the teacher."""
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

    def select_targets(
        self, matched_states: MatchedStates, recorder: "ArgmaxRecorder", batch: Batch
    ) -> ProjectorTargets:
        """The text's next token; one that the student wrote itself is not learnt."""
        return ProjectorTargets(
            supervised_positions(batch)[1][matched_states.student_rows], gold_mask(batch)[matched_states.student_rows]
        )


class DualSpaceV2(DualSpaceBase):
    """D(Z_t2s || Z_s) + CE(Z_t2s, y_t) + D(Z_t || Z_s2t), with y_t the teacher's likeliest token.

    P_t2s = W_t^T pinv(W_s^T) at the start, without bias: the teacher's logits projected onto what the student's head
    can say. P_s2t = W_s^T pinv(W_t^T) is computed anew from the student's head in every pass, and not trained. The
    first term counts where Z_t2s prefers y_t; where it does not, the summand is 0 and the divisor stays.

    `scale` is that of the teacher's head by that of the student's (Cohere, Granite); both maps leave out a soft-cap.
    Across tokenizers (`bridge` an `AlignedRows`) the heads are compared on `shared [2 S]`, the ids of the student and
    of the teacher that are the same string, and rows at which y_t is none of them are left out of the first two terms.

    Source: Zhang et al., "A Dual-Space Framework for General Knowledge Distillation" (arXiv:2504.11426).
    Departs from the authors' code: the divisor above, where the code averages over the rows that agree; tau^2; rows at
    which the student has no y_t count in the third term too, where the code drops them from all three.

    Raises: UnsupportedModel when called with a network whose head cannot be read.
    """

    group: ClassVar[ParamGroup] = PROJECTOR_GROUP_V2
    needs_teacher_argmax: ClassVar[bool] = True
    masks_disagreement = True

    def __init__(
        self,
        student_weight: Float[Tensor, "V F"],
        teacher_weight: Float[Tensor, "W D"],
        config: DualSpaceConfig | None = None,
        bridge: RowMatcher | None = None,
        shared_token_ids: Int[Tensor, "2 S"] | None = None,
        logit_scale_ratio: float = 1.0,
    ) -> None:
        super().__init__(config or DualSpaceConfig(name="dskdv2"), bridge)
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
        """The rows that are reached: of the student for the first two terms, of the teacher for the third."""
        num_student_rows, num_teacher_rows = map(len, self.bridge.match_rows(batch, self.config.teacher))
        return dict(zip(self.config.term_names, (num_student_rows, num_student_rows, num_teacher_rows), strict=True))

    def project_to_student(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        """Through the learned map that began as the pseudo-inverse's."""
        return states @ self.to_student.to(states.dtype)

    def project_to_teacher(
        self, states: Float[Tensor, "Q F"], student: Signals, teacher: Signals
    ) -> Float[Tensor, "Q D"]:
        """Through the pseudo-inverse's map for the student's head as it is now."""
        return states @ self.compute_teacher_projection(student, teacher).to(states.dtype)

    def select_targets(
        self, matched_states: MatchedStates, recorder: "ArgmaxRecorder", batch: Batch
    ) -> ProjectorTargets:
        """The student's id of what the teacher finds likeliest, where it has one; bridges here pair single rows."""
        tokens = self.id_map.match_device(recorder.argmax)[recorder.argmax]
        return ProjectorTargets(tokens, tokens != NO_TOKEN)

    @torch.no_grad()
    def compute_teacher_projection(self, student: Signals, teacher: Signals) -> Float[Tensor, "F D"]:
        """P_s2t of the student's head as it is now."""
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
    """A tensor that is neither trained nor saved; it follows what it is used with to its device."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def match_device(self, tensor: Tensor) -> Tensor:
        """The value where `other` lies."""
        self.value = self.value.to(tensor.device)
        return self.value


class ArgmaxRecorder:
    """The logits that `head` gives for the states of rows, and, if it `hears`, the likeliest token of each."""

    def __init__(self, head: Head, states: Float[Tensor, "Q D"], *, records_argmax: bool) -> None:
        self.logits_fn, self.records_argmax = row_terms.make_head_logits_fn(head, states), records_argmax
        self.argmax = torch.zeros(len(states), dtype=torch.long, device=states.device)

    def __call__(self, start: int, stop: int) -> Float[Tensor, "C V"]:
        logits = self.logits_fn(start, stop)
        if self.records_argmax:
            self.argmax[start:stop] = logits.max(-1).indices  # argmax takes four times as long in bfloat16
        return logits


def compute_teacher_space_loss(
    divergence: Divergence,
    config: DualSpaceConfig,
    states: Float[Tensor, "Q D"],
    head: Head,
    logits_fn: row_terms.RowInputFn,
) -> Float[Tensor, ""]:
    """tau^2 D(Z_t, Z_s2t) summed over the teacher's rows that were reached; `said` are their Z_t."""
    loss = DivergenceRows(divergence, temperature=config.temperature, teacher=config.teacher)
    targets = torch.zeros(len(states), dtype=torch.long, device=states.device)
    return sum_row_loss(loss, states, head, targets, **{config.teacher: logits_fn})


def sum_row_loss(
    loss: RowLoss, states: Float[Tensor, "N F"], head: Head, targets: Int[Tensor, " N"], **inputs: row_terms.RowInputFn
) -> Float[Tensor, ""]:
    """`loss` summed over the rows of projected states through a constant head."""
    (total,) = fused.sum_row_losses([loss], states, head, targets=targets, frozen=inputs, mix=[1.0])
    return total
