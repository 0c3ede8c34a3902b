"""Several teachers of one student: averaged, weighted by confidence, or each on its own documents.

    L = sum_n sum_k w_k(n) D(p_k(n), q(n))        sum_k w_k(n) = 1

The parts are objectives over rows, one for each teacher. Each has its own name, so metrics show each teacher. All parts
share one pass over the student's head in chunks, so the logits of all rows are never in memory together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.core.errors import UsageError
from potstill.core.types import Batch, Needs, Objective, Signals, Terms, gold_mask, supervised_positions
from potstill.objectives import row_terms
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.coarse import CoarseDistribution
from potstill.ops.row_loss import Weighted, WhereAvailable
from potstill.ops.row_subset import RowSubset

MIN_LOG_PROB = -1e4  # finite, so that teachers at this bound weigh the same, and negligible next to any other

Combination = Literal["average", "confidence", "route"]
COMBINATIONS: tuple[str, ...] = get_args(Combination)


class TeacherEnsemble(NamedTuple):
    """Several teachers by name, in the order of the route numbers, and their combination."""

    names: tuple[str, ...]
    combination: Combination

    @property
    def networks(self) -> tuple[str, ...]:
        """The name of each teacher among the models of a `TrainingModule`, which has a `student` too."""
        return tuple(f"teacher {name}" for name in self.names)


def average_teachers(parts: Sequence[LogitDistillation]) -> WeightedSum:
    """w_k = 1 / K: the mean of the teachers' losses.

    This is not the loss of the mixture m = mean_k p_k. Both have the same gradient only under forward KL: mean_k KL(p_k
    || q) = KL(m || q) + mean_k KL(p_k || m). The last summand, the teachers' disagreement, does not depend on q. Each
    term is that teacher's own divergence, without weight.
    """
    return WeightedSum(*((1 / len(parts), part) for part in parts))


class _RowWeightedObjective(row_terms.RowObjectiveMixin):
    """The base of combinations with weights for each row: their terms add up to one sum over all rows."""

    additive: ClassVar[bool] = True

    def __init__(self, parts: Sequence[LogitDistillation]) -> None:
        self.parts = tuple(parts)

    @property
    def weights(self) -> Mapping[str, float]:
        """One term for each teacher, with weight 1: the teacher's share of the sum."""
        return {name: 1.0 for part in self.parts for name in part.weights}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """All supervised positions for every term, so that all rows have the same weight under any teacher."""
        return dict.fromkeys(self.weights, len(supervised_positions(batch)[1]))


class ConfidenceWeightedTeachers(_RowWeightedObjective):
    """w_k(n) = p_k(y_n) / sum_j p_j(y_n), with y_n the true next token: a teacher that finds it likelier weighs more.

    This is softmax_k of log p_k(y_n), p_k at the temperature of the loss. With equal priors it is the posterior
    probability that teacher k generated y_n. A token that the student sampled is not ground truth: there all teachers
    have the same weight. Partial distributions (of a cache or server) give p_k(y_n) if they list y_n, else an equal
    share of the rest of its class.

    It computes each teacher's head twice: once for these weights, once for the loss.

    Source: Zhang, Chen and Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation" (arXiv:2201.00007), whose
    weights are (1 - softmax_k of -log p_k(y_n)) / (K - 1). Departs from the paper: with two teachers both formulas are
    equal. With more, the paper gives the best teacher at most 1 / (K - 1), however confident it is. The paper also
    compares features of middle layers.
    """

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of the student and of every teacher at the same positions."""
        return {network: needs for part in self.parts for network, needs in part.needs(batch).items()}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """w_k D_k of each row, for each teacher."""
        terms = {}
        for part, weights in zip(self.parts, self.compute_confidences(frozen, batch), strict=True):
            weights_key = f"{part.name}.weights"
            ((name, term),) = part.split(views, frozen, batch)[0].items()
            loss, inputs = Weighted(term.loss, weights_key), {**term.inputs, weights_key: _make_slice_fn(weights)}  # type: ignore[arg-type]
            terms[name] = row_terms.RowTerm(loss, inputs)
        return terms, {}

    @torch.no_grad()
    def compute_confidences(self, frozen: Mapping[str, Signals], batch: Batch) -> Float[Tensor, "K N"]:
        """w_k(n), which sum to 1 over the teachers."""
        targets = supervised_positions(batch)[1]
        log_probs = [
            row_terms.compute_target_log_probs(frozen[part.teacher], targets, temperature=part.temperature)
            for part in self.parts
        ]
        return torch.where(gold_mask(batch), torch.stack(log_probs).clamp_min(MIN_LOG_PROB), 0.0).softmax(0)


class RoutedTeachers(_RowWeightedObjective):
    """w_k(n) = 1 for the teacher of row n's document by the batch's `routes`, else 0.

    Each teacher reads only its own documents, and does not run in a pass without any.
    """

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """All of the student's rows, and each teacher's own."""
        positions = supervised_positions(batch)[0]
        teacher_needs = {part.teacher: Needs(positions & (batch["routes"] == k)) for k, part in enumerate(self.parts)}
        return {"student": Needs(positions), **teacher_needs}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """D_k of each of the teacher's own rows; 0 for a teacher without any."""
        routes = batch["routes"][supervised_positions(batch)[0]]
        terms, zero_terms = {}, {}
        for k, part in enumerate(self.parts):
            if part.teacher not in frozen:
                zero_terms[part.name] = torch.zeros((), device=routes.device)
                continue
            ((name, term),) = part.split(views, frozen, batch)[0].items()
            inputs = {part.teacher: _make_partial_fn(term.inputs[part.teacher], routes == k)}
            terms[name] = row_terms.RowTerm(WhereAvailable(term.loss, part.teacher), inputs)  # type: ignore[arg-type]
        return terms, zero_terms


def combine_teachers(ensemble: TeacherEnsemble, parts: Sequence[LogitDistillation]) -> Objective:
    """The objective of several teachers, from the objective of each."""
    builders: Mapping[str, Callable[[Sequence[LogitDistillation]], Objective]] = {
        "average": average_teachers,
        "confidence": ConfidenceWeightedTeachers,
        "route": RoutedTeachers,
    }
    if len(parts) < 2:
        raise UsageError(f"{len(parts)} teacher cannot be combined; give --teacher more than once")
    return builders[ensemble.combination](parts)


def _make_partial_fn(input_fn: row_terms.RowInputFn, mask: Tensor) -> row_terms.RowInputFn:
    """The inputs of rows `start` to `stop`, from a function that numbers only the rows of `mask`."""
    offsets = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.long().cumsum(0)])

    def read_rows(start: int, stop: int) -> RowSubset:
        first, last = int(offsets[start]), int(offsets[stop])
        values = input_fn(first, last)
        assert isinstance(values, Tensor | CoarseDistribution)
        return RowSubset(values, torch.where(mask[start:stop], offsets[start:stop] - first, -1))

    return read_rows


def _make_slice_fn(values: Float[Tensor, " N"]) -> row_terms.RowInputFn:
    return lambda start, stop: values[start:stop]
