"""Objectives that are functions of the log-probabilities of whole answers, in the head's one pass over rows.

An answer is a document with a side (`core.types`). The loss of several answers, an item, is a function of the sums of
log q(target) over the rows of each. So every row of an answer has the same coefficient, the derivative of the loss by
the answer's sum, and `ops.row_loss.Tangent` sums the loss.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import Batch, Needs, Signals, Terms, supervised_positions
from potstill.objectives import row_terms
from potstill.ops.likelihood import sum_groups
from potstill.ops.preference import Side
from potstill.ops.row_loss import Constants, Tangent
from potstill.ops.row_spans import LikelihoodInputs, number_units

SIDES = "sides"  # the key of a batch: the side of each document


class Items(NamedTuple):
    """The items of a loss.

    Attributes:
        documents: the documents of each item: two of a pair, or one.
        sets: the number of the set of documents that a loss needs together, for each document of the batch; -1: none.
    """

    documents: Int[Tensor, "P K"]
    sets: Int[Tensor, " D"]


class AnswerSums(NamedTuple):
    """The log-probabilities of each document's answer, and its number of tokens; 0 for a document without an answer."""

    policy: Float[Tensor, " D"]
    reference: Float[Tensor, " D"]
    tokens: Float[Tensor, " D"]

    def select(self, documents: Int[Tensor, " P"]) -> Side:
        """The answers of some documents."""
        return Side(self.policy[documents], self.reference[documents], self.tokens[documents].clamp(min=1))


class AnswerObjective(row_terms.RowObjectiveMixin):
    """The base of an objective over whole answers: it names its items and measures them.

    `measure` gives the loss of each item under the name of the objective, and each metric, a term of weight 0.
    """

    name: str

    @property
    def reference(self) -> str | None:
        """The frozen network to compare with, if there is one."""
        raise NotImplementedError

    @property
    def metrics(self) -> Sequence[str]:
        """The names of the metrics."""
        raise NotImplementedError

    def find_items(self, batch: Batch) -> Items:
        """The items of the batch."""
        raise NotImplementedError

    def measure(
        self, sums: AnswerSums, documents: Int[Tensor, "P K"], items: Items, batch: Batch
    ) -> Mapping[str, Float[Tensor, " P"]]:
        """The loss and the metrics of the items of these documents, by name; differentiable by `sums.policy`."""
        raise NotImplementedError

    @property
    def weights(self) -> Mapping[str, float]:
        """The loss with weight 1, and metrics with weight 0."""
        return {self.name: 1.0, **dict.fromkeys(self.metrics, 0.0)}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of the student and of the reference at the supervised positions."""
        needs = Needs(supervised_positions(batch)[0])
        return {"student": needs} if self.reference is None else {"student": needs, self.reference: needs}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """The loss as a sum over rows, and the metrics at the first row of each item."""
        _, targets, documents = supervised_positions(batch)
        items, num_documents = self.find_items(batch), len(get_sides(batch, self.name))
        units = number_units(items.sets[documents])
        frozen_log_p = None
        if self.reference is not None:
            frozen_log_p = row_terms.compute_target_log_probs(frozen[self.reference], targets, units=units)
        tokens = torch.bincount(documents, minlength=num_documents)
        first_rows = torch.searchsorted(documents, torch.arange(num_documents, device=documents.device))
        first = first_rows[items.documents].amin(1).clamp(max=max(0, len(documents) - 1))

        def compute(start: int, log_q: Float[Tensor, " C"]) -> Mapping[str, Tensor]:
            stop = start + len(log_q)
            is_here, rows = (first >= start) & (first < stop), documents[start:stop]
            policy, reference = (
                log_q.new_zeros(num_documents) if log_p is None else sum_groups(log_p, rows, num_documents)
                for log_p in (log_q, None if frozen_log_p is None else frozen_log_p[start:stop].to(log_q.dtype))
            )
            with torch.enable_grad():
                policy = policy.requires_grad_()
                sums = AnswerSums(policy, reference, tokens.to(log_q.dtype))
                values = self.measure(sums, items.documents[is_here], items, batch)
                (slopes,) = torch.autograd.grad(values[self.name].sum(), policy)
            columns = {
                name: torch.zeros_like(log_q).index_add(0, first[is_here] - start, value.detach().to(log_q.dtype))
                for name, value in values.items()
            }
            return {**columns, self.name: torch.stack([columns[self.name], slopes[rows], log_q], 1)}

        likelihoods = LikelihoodInputs(units, compute)
        losses = {name: Constants(name) if name in self.metrics else Tangent(name) for name in self.weights}
        return {name: row_terms.RowTerm(loss, likelihoods=likelihoods) for name, loss in losses.items()}, {}


def get_sides(batch: Batch, name: str) -> Int[Tensor, " D"]:
    """The side of each document.

    Raises: DataError for a batch without sides, which the objective `name` cannot train on.
    """
    if SIDES not in batch:
        raise DataError(f"the batch has no sides of pairs or labels; train {name} on preferences, by potstill align")
    return batch[SIDES]
