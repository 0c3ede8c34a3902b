"""The teacher's distributions brought into the student's vocabulary by likeness of spelling (MinED)."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from potstill.core.types import WARPED, Batch, Needs, Signals, Terms, gold, supervised, view
from potstill.objectives import rows
from potstill.objectives.bridge import aligned, each
from potstill.ops.layout import through
from potstill.ops.row_loss import DivergenceRows, Kept

NEVER = -1e5  # a logit so low that its probability is 0 in any dtype, and 0 times it is 0


class Edited(rows.OverRows):
    """sum over the student's rows of tau^2 KL(p' || q), with p' the teacher's row in the student's vocabulary.

    `nearest [V_t]` names the student's id that is written most like each of the teacher's, -1 where none is
    (`models.nearest`). Of several of the teacher's ids for one of the student's the first counts. At a row that is
    aligned, p' is softmax over the student's ids that have one; at every other it is all at the text's next token.

    The batch key `warped [2 P]` pairs a row of the student with the row of the teacher that the cheapest path through
    their own tokens (`ops.edit.warped`, the teacher first, spaces stripped) gives it, where that gives one alone
    (`ops.edit.alone`); rows count the supervised ones of each side, as in `pairs`. Without the key each row is paired
    with itself. A pair is aligned where `nearest` takes the teacher's own token to the student's.

    Source: Wan et al. (arXiv:2401.10491), as the baseline of DSKD's code. Departs from that code: likeness is bounded
    (`models.nearest`), over bytes; tau^2, which there is left out.
    """

    additive: ClassVar[bool] = True

    def __init__(
        self,
        nearest: Int[Tensor, " V_t"],
        vocabulary: int,
        *,
        temperature: float = 1.0,
        teacher: str = "teacher",
        name: str = "mined",
    ) -> None:
        self.nearest, self.source = nearest, first_of_each(nearest, vocabulary)
        self.temperature, self.teacher, self.name = temperature, teacher, name

    @property
    def weights(self) -> Mapping[str, float]:
        """The one term, weighing 1."""
        return {self.name: 1.0}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """Each network's own supervised rows."""
        return each(batch, self.teacher)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The student's supervised rows, of a rollout those with a row to learn from."""
        return {self.name: int(self._taught(batch, self.partners(batch)).sum())}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, rows.RowTerm], Terms]:
        """tau^2 KL(p' || q) of each row."""
        teacher, targets, told = frozen[self.teacher], supervised(batch)[1], f"{self.name}_told"
        partner = self.partners(batch)
        over_ours = over(self.source.to(partner.device), teacher)

        def telling(start: int, stop: int) -> Float[Tensor, "C V"]:
            return told_rows(over_ours, teacher.rows, partner[start:stop], targets[start:stop])

        loss, kept = DivergenceRows(temperature=self.temperature, teacher=told), f"{self.name}_kept"
        taught = self._taught(batch, partner)
        return {self.name: rows.RowTerm(Kept(loss, kept), {told: telling, kept: lambda a, b: taught[a:b]})}, {}

    def _taught(self, batch: Batch, partner: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
        """Where there is something to learn from: a row of the teacher, or a token that the student did not write."""
        return gold(batch) | (partner >= 0)

    def partners(self, batch: Batch) -> Int[Tensor, " N"]:
        """For each of the student's rows the teacher's that it learns from, -1 where none is aligned with it."""
        own = {name: _own_tokens(view(batch, name)) for name in ("student", self.teacher)}
        ours, theirs = aligned(batch, WARPED)
        same = self.nearest.to(theirs.device)[own[self.teacher][theirs]] == own["student"][ours]
        return rows.spread(theirs.masked_fill(~same, -1), ours, len(own["student"]), -1)


def first_of_each(nearest: Int[Tensor, " V_t"], vocabulary: int) -> Int[Tensor, " V_s"]:
    """For each of the student's ids the first of the teacher's that is nearest to it, -1 where none is."""
    theirs = (nearest >= 0).nonzero()[:, 0]
    none = torch.full((vocabulary,), len(nearest), device=nearest.device)
    first = none.scatter_reduce(0, nearest[theirs], theirs, "amin")
    return first.masked_fill(first == len(nearest), -1)


def over(source: Int[Tensor, " V_s"], teacher: Signals) -> Callable[[Tensor], Tensor]:
    """What gives the teacher's logits for the student's ids, by those rows of its head alone where it can be read."""
    columns, none = source.clamp(min=0), source < 0
    if teacher.head is None:
        return lambda states: teacher.logits(states)[:, columns].masked_fill_(none, NEVER)
    whole = rows.frozen_head(teacher, "teacher")
    head = whole._replace(weight=whole.weight[columns], bias=None if whole.bias is None else whole.bias[columns])
    return lambda states: through(head.logits, states).masked_fill_(none, NEVER)


def told_rows(
    logits: Callable[[Tensor], Tensor],
    states: Float[Tensor, "M D"],
    partner: Int[Tensor, " C"],
    targets: Int[Tensor, " C"],
) -> Float[Tensor, "C V"]:
    """`logits` of the partner's states, over the student's ids; where there is no partner, certain of the target."""
    known: Bool[Tensor, " C"] = partner >= 0
    some = logits(states[partner[known]])
    found = some.new_full((len(partner), some.shape[1]), NEVER)
    found[known] = some
    lost = (~known).nonzero()[:, 0]
    found[lost, targets[lost]] = 0
    return found


def _own_tokens(batch: Batch) -> Int[Tensor, " N"]:
    """The token that each row is the last to have read."""
    return batch["input_ids"][supervised(batch)[0]]
