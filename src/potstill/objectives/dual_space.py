"""The code that both versions of dual-space distillation share: two comparisons, each under one model's head.

    Z_t2s = P_t2s(H_t) W_s^T    the teacher's hidden states [N D] through the student's head, [N V_s]
    Z_s2t = P_s2t(H_s) W_t^T    the student's hidden states [M d] through the teacher's head, [M V_t]

Hidden states are those after the final norm. A `RowMatcher` maps them to the rows of the other model. Heads are
constants here: only the terms over the student's own logits train its head. Training trains the projectors with the
student, and then discards them. `objectives.dskd` and `objectives.dskdv2` are the two versions.

| term | gradient goes to |
|---|---|
| student space: D(sg Z_t2s, Z_s) | the student, its head included |
| projector: CE(Z_t2s, label) | P_t2s and the row matcher |
| teacher space: D(Z_t, Z_s2t) | the student's body, P_s2t and the row matcher |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from potstill.core.types import Batch, Head, Needs, Signals, Terms, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.row_matching import MatchedStates, RowMatcher, SameRowMatcher
from potstill.objectives.spec import ObjectiveOptions
from potstill.ops import fused
from potstill.ops.divergence import Divergence, forward_kl
from potstill.ops.layout import apply_padded
from potstill.ops.row_loss import CrossEntropyRows, DivergenceRows, RowLoss, WhereArgmaxIs

NO_TOKEN = -1  # in place of a token id where a row has no target


@dataclass(frozen=True, kw_only=True)
class DualSpaceConfig:
    """The comparison of both spaces: `divergence` at temperature tau, times tau^2 as in `LogitDistillation`.

    `name` is the prefix of the term names.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    teacher: str = "teacher"
    name: str = "dskd"

    @classmethod
    def from_options(cls, options: ObjectiveOptions) -> "DualSpaceConfig":
        """The same from the options of an objective."""
        return cls(divergence=options.divergence, temperature=options.temperature, name=options.name)

    @property
    def term_names(self) -> tuple[str, str, str]:
        """The terms of the student's space, of the projector P_t2s, and of the teacher's space."""
        return f"{self.name}_student_space", f"{self.name}_projector", f"{self.name}_teacher_space"

    @property
    def projected_key(self) -> str:
        """The name under which a row loss gets Z_t2s."""
        return f"{self.name}_projected"

    @property
    def label_key(self) -> str:
        """The name under which a row loss gets the target token of Z_t2s."""
        return f"{self.name}_label"


class ProjectorTargets(NamedTuple):
    """The target token of Z_t2s at each matched row, and whether the row trains the projector."""

    tokens: Int[Tensor, " P"]
    is_trained: Bool[Tensor, " P"]


class DualSpace(nn.Module):
    """Three terms, each with weight 1, from the same rows, heads and projected states.

    A version defines the projections to the other width and the target token of Z_t2s. `needs_teacher_argmax`: that
    token is the teacher's argmax. `masks_disagreement`: the first term counts only rows where the argmax of Z_t2s is
    that token. `teacher_space_divergence` is the divergence of the teacher's space.
    """

    additive: ClassVar[bool] = True
    needs_teacher_argmax: ClassVar[bool] = False
    masks_disagreement: bool
    teacher_space_divergence: Divergence

    def __init__(self, config: DualSpaceConfig, row_matcher: RowMatcher | None) -> None:
        super().__init__()
        self.config = config
        self.bridge = row_matcher or SameRowMatcher()  # its weights are called `bridge.` in checkpoints

    @property
    def weights(self) -> Mapping[str, float]:
        """Three terms, each with weight 1."""
        return dict.fromkeys(self.config.term_names, 1.0)

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """What the row matcher needs of student and teacher."""
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
        """The target token of Z_t2s; `recorder` has the teacher's argmax in its own space."""
        raise NotImplementedError

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """The term of the student's space, over its rows, and the two others."""
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


class ArgmaxRecorder:
    """The logits of rows through `head`; with `records_argmax`, it also stores the likeliest token of each row."""

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
    """tau^2 D(Z_t, Z_s2t) summed over the matched rows of the teacher; `logits_fn` gives their Z_t."""
    loss = DivergenceRows(divergence, temperature=config.temperature, teacher=config.teacher)
    targets = torch.zeros(len(states), dtype=torch.long, device=states.device)
    return sum_row_loss(loss, states, head, targets, **{config.teacher: logits_fn})


def sum_row_loss(
    loss: RowLoss, states: Float[Tensor, "N F"], head: Head, targets: Int[Tensor, " N"], **inputs: row_terms.RowInputFn
) -> Float[Tensor, ""]:
    """`loss` summed over rows of projected states through a constant head."""
    (total,) = fused.sum_row_losses([loss], states, head, targets=targets, frozen=inputs, mix=[1.0])
    return total
