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

from potstill.core.types import Batch, Group, Head, Needs, Signals, Terms, gold, supervised
from potstill.objectives import rows
from potstill.objectives.bridge import Bridge, Bridged, CrossAttention, SameRows
from potstill.ops import fused
from potstill.ops.divergence import Divergence, forward_kl
from potstill.ops.layout import through
from potstill.ops.projection import inverse_gram, onto_rows
from potstill.ops.row_loss import Agreeing, CrossEntropyRows, DivergenceRows, RowLoss

FAST = Group("projectors", rate=2.0)  # 1e-3 beside the student's 5e-4, as in the scripts of the first version
LIKE_THE_STUDENT = Group("projectors")  # 5e-4 both, as in those of the second
NOBODY = -1  # in place of a token id: this row has no counterpart


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """How the two spaces are compared: by `divergence` at temperature tau, times tau^2 as in `objectives.distill`.

    `name` opens the names of the terms.
    """

    divergence: Divergence = forward_kl
    temperature: float = 1.0
    teacher: str = "teacher"
    name: str = "dskd"

    @property
    def terms(self) -> tuple[str, str, str]:
        """The student's space, what trains P_t2s, and the teacher's space."""
        return f"{self.name}_student_space", f"{self.name}_projector", f"{self.name}_teacher_space"

    @property
    def projected(self) -> str:
        """By what name a row loss hears of Z_t2s."""
        return f"{self.name}_projected"

    @property
    def label(self) -> str:
        """By what name a row loss hears of the token that Z_t2s has to prefer."""
        return f"{self.name}_label"


class Choice(NamedTuple):
    """The token that Z_t2s has to prefer at each row that is reached, and at which of them it is learnt."""

    token: Int[Tensor, " P"]
    learnt: Bool[Tensor, " P"]


class TwoSpaces(nn.Module):
    """What both versions share: three terms, each weighing 1, from the same rows, heads and projected states.

    A version says how states get to the other width, which token Z_t2s has to prefer, whether that is one that the
    teacher finds likeliest (`hears`), whether the first term counts only where it does (`agreeing`), and by what the
    teacher's space is compared (`inside`).
    """

    additive: ClassVar[bool] = True
    hears: ClassVar[bool] = False
    agreeing: bool
    inside: Divergence

    def __init__(self, spaces: Spaces, bridge: Bridge | None) -> None:
        super().__init__()
        self.spaces, self.bridge = spaces, bridge or SameRows()

    @property
    def weights(self) -> Mapping[str, float]:
        """Three terms, each weighing 1."""
        return dict.fromkeys(self.spaces.terms, 1.0)

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """What the bridge needs of student and teacher."""
        return self.bridge.needs(batch, self.spaces.teacher)

    def forth(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        """The teacher's states in the student's space, by P_t2s."""
        raise NotImplementedError

    def back(self, states: Float[Tensor, "Q F"], student: Signals, teacher: Signals) -> Float[Tensor, "Q D"]:
        """The student's states in the teacher's space, by P_s2t."""
        raise NotImplementedError

    def choice(self, bridged: Bridged, said: "Noting", batch: Batch) -> Choice:
        """Which token Z_t2s has to prefer; `said` is what the teacher has said in its own space."""
        raise NotImplementedError

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, rows.RowTerm], Terms]:
        """The term in the student's space, over its rows, and the two others."""
        spaces, n = self.spaces, len(supervised(batch)[1])
        student, teacher = views["student"], frozen[spaces.teacher]
        ours, theirs = rows.frozen_head(student, "student"), rows.frozen_head(teacher, "teacher")
        bridged = self.bridge(student, teacher, batch, spaces.teacher)
        back = through(lambda states: self.back(states, student, teacher), bridged.to_teacher)
        said = Noting(theirs, teacher.rows[bridged.theirs], hears=self.hears)
        in_theirs = in_teachers_space(self.inside, spaces, back, theirs, said)
        token, learnt = self.choice(bridged, said, batch)
        projected = through(self.forth, bridged.to_student)
        everywhere = rows.spread(projected.detach(), bridged.ours, n, 0)
        labels = rows.spread(token, bridged.ours, n, NOBODY)
        told = {spaces.projected: rows.telling(ours, everywhere), spaces.label: lambda a, b: labels[a:b]}
        loss: Any = DivergenceRows(spaces.divergence, temperature=spaces.temperature, teacher=spaces.projected)
        if self.agreeing:
            loss = Agreeing(loss, said=spaces.projected, choice=spaces.label)
        in_student, projector, in_teacher = spaces.terms
        return {in_student: rows.RowTerm(loss, told)}, {
            projector: summed(CrossEntropyRows(), projected[learnt], ours, token[learnt]),
            in_teacher: in_theirs,
        }

    forward = rows.OverRows.__call__


class DualSpace(TwoSpaces):
    """D(Z_t2s || Z_s) + CE(Z_t2s, y) + KL(Z_t || Z_s2t), with y the text's next token.

    P_t2s and P_s2t are linear maps with bias, as torch draws them. The teacher's space is compared by forward KL
    whatever the divergence. Across tokenizers (`bridge` a `CrossAttention`) the first term counts only where Z_t2s
    prefers y; where it does not, the summand is 0 and the divisor stays.

    Source: Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models" (arXiv:2406.17328), section 3.
    Departs from the authors' code: tau^2, which there is left out; the teacher's space is averaged over the teacher's
    rows, where the code divides by the student's.

    Raises: UnsupportedModel when called with a network whose head cannot be read.
    """

    group: ClassVar[Group] = FAST

    def __init__(
        self, student_width: int, teacher_width: int, spaces: Spaces | None = None, bridge: Bridge | None = None
    ) -> None:
        super().__init__(spaces or Spaces(), bridge)
        self.inside, self.agreeing = forward_kl, isinstance(bridge, CrossAttention)
        self.to_student = nn.Linear(teacher_width, student_width)
        self.to_teacher = nn.Linear(student_width, teacher_width)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The rows that are reached: of the student, of it where the text is the data's own, and of the teacher."""
        ours, theirs = self.bridge.reached(batch, self.spaces.teacher)
        return dict(zip(self.spaces.terms, (len(ours), int(gold(batch)[ours].sum()), len(theirs)), strict=True))

    def forth(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        """Through a learned map."""
        found: Tensor = self.to_student(states)
        return found

    def back(self, states: Float[Tensor, "Q F"], student: Signals, teacher: Signals) -> Float[Tensor, "Q D"]:
        """Through a learned map."""
        found: Tensor = self.to_teacher(states)
        return found

    def choice(self, bridged: Bridged, said: "Noting", batch: Batch) -> Choice:
        """The text's next token; one that the student wrote itself is not learnt."""
        return Choice(supervised(batch)[1][bridged.ours], gold(batch)[bridged.ours])


class DualSpaceV2(TwoSpaces):
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

    group: ClassVar[Group] = LIKE_THE_STUDENT
    hears: ClassVar[bool] = True
    agreeing = True

    def __init__(
        self,
        student: Float[Tensor, "V F"],
        teacher: Float[Tensor, "W D"],
        spaces: Spaces | None = None,
        bridge: Bridge | None = None,
        shared: Int[Tensor, "2 S"] | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(spaces or Spaces(name="dskdv2"), bridge)
        self.inside, self.scale = self.spaces.divergence, scale
        both = min(len(student), len(teacher))
        ours, theirs = torch.arange(both).expand(2, -1) if shared is None else shared
        self.to_student = nn.Parameter(scale * onto_rows(teacher[theirs], student[ours]))  # [D F]
        known = torch.full((len(teacher),), NOBODY)
        known[theirs] = ours
        self.shared = _Constant(torch.stack([ours, theirs]))
        self.known = _Constant(known)  # the student's id of each of the teacher's
        self.gram = _Constant(inverse_gram(teacher[theirs]))

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The rows that are reached: of the student for the first two terms, of the teacher for the third."""
        ours, theirs = map(len, self.bridge.reached(batch, self.spaces.teacher))
        return dict(zip(self.spaces.terms, (ours, ours, theirs), strict=True))

    def forth(self, states: Float[Tensor, "P D"]) -> Float[Tensor, "P F"]:
        """Through the learned map that began as the pseudo-inverse's."""
        return states @ self.to_student.to(states.dtype)

    def back(self, states: Float[Tensor, "Q F"], student: Signals, teacher: Signals) -> Float[Tensor, "Q D"]:
        """Through the pseudo-inverse's map for the student's head as it is now."""
        return states @ self.to_teacher(student, teacher).to(states.dtype)

    def choice(self, bridged: Bridged, said: "Noting", batch: Batch) -> Choice:
        """The student's id of what the teacher finds likeliest, where it has one; bridges here pair single rows."""
        token = self.known.on(said.likeliest)[said.likeliest]
        return Choice(token, token != NOBODY)

    @torch.no_grad()
    def to_teacher(self, student: Signals, teacher: Signals) -> Float[Tensor, "F D"]:
        """P_s2t of the student's head as it is now."""
        mine, yours = rows.head_of(student, "student").weight, rows.head_of(teacher, "teacher").weight
        ours, theirs = self.shared.on(mine)
        return onto_rows(mine[ours], yours[theirs], self.gram.on(mine)) / self.scale


class _Constant:
    """A tensor that is neither trained nor saved; it follows what it is used with to its device."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def on(self, other: Tensor) -> Tensor:
        """The value where `other` lies."""
        self.value = self.value.to(other.device)
        return self.value


class Noting:
    """The logits that `head` gives for the states of rows, and, if it `hears`, the likeliest token of each."""

    def __init__(self, head: Head, states: Float[Tensor, "Q D"], *, hears: bool) -> None:
        self.tell, self.hears = rows.telling(head, states), hears
        self.likeliest = torch.zeros(len(states), dtype=torch.long, device=states.device)

    def __call__(self, start: int, stop: int) -> Float[Tensor, "C V"]:
        logits = self.tell(start, stop)
        if self.hears:
            self.likeliest[start:stop] = logits.max(-1).indices  # argmax takes four times as long in bfloat16
        return logits


def in_teachers_space(
    divergence: Divergence, spaces: Spaces, states: Float[Tensor, "Q D"], head: Head, said: rows.Telling
) -> Float[Tensor, ""]:
    """tau^2 D(Z_t, Z_s2t) summed over the teacher's rows that were reached; `said` are their Z_t."""
    loss = DivergenceRows(divergence, temperature=spaces.temperature, teacher=spaces.teacher)
    targets = torch.zeros(len(states), dtype=torch.long, device=states.device)
    return summed(loss, states, head, targets, **{spaces.teacher: said})


def summed(
    loss: RowLoss, states: Float[Tensor, "N F"], head: Head, targets: Int[Tensor, " N"], **said: rows.Telling
) -> Float[Tensor, ""]:
    """`loss` summed over the rows of projected states through a constant head."""
    (total,) = fused.sums([loss], states, head, targets=targets, frozen=said, mix=[1.0])
    return total
