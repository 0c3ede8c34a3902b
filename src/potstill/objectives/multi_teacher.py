"""Several teachers in one distillation: averaged, weighted by confidence, or each for its own documents.

    L = sum_n sum_k w_k(n) D(p_k(n), q(n))        sum_k w_k(n) = 1

The parts are objectives over rows, one for each teacher; each keeps its name, so that metrics show each. All of them
share one pass over the student's head, in chunks: of all rows together, nothing as wide as a vocabulary is ever held.
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

MIN_LOG_PROB = (
    -1e4
)  # a log-probability so low that it weighs nothing beside any other, and as much as another one of it

Combination = Literal["average", "confidence", "route"]
COMBINATIONS: tuple[str, ...] = get_args(Combination)


class TeacherEnsemble(NamedTuple):
    """Several teachers by name, in the order of the numbers of routes, and how they teach together."""

    names: tuple[str, ...]
    combination: Combination

    @property
    def networks(self) -> tuple[str, ...]:
        """What each is called among the networks of a study, where `student` is one too."""
        return tuple(f"teacher {name}" for name in self.names)


def average_teachers(parts: Sequence[LogitDistillation]) -> WeightedSum:
    """w_k = 1 / K: the mean of what each teacher alone would teach.

    Learning from the mixture m = mean_k p_k is something else, except under the forward KL, where both have one
    gradient: mean_k KL(p_k || q) = KL(m || q) + mean_k KL(p_k || m), and the last summand, the teachers' disagreement,
    does not depend on q. Each term is that teacher's own divergence, unweighted.
    """
    return WeightedSum(*((1 / len(parts), part) for part in parts))


class _RowWeightedObjective(row_terms.RowObjectiveMixin):
    """What the combinations share in which a row's weights are its own: terms that add up to one sum over all rows."""

    additive: ClassVar[bool] = True

    def __init__(self, parts: Sequence[LogitDistillation]) -> None:
        self.parts = tuple(parts)

    @property
    def weights(self) -> Mapping[str, float]:
        """One term a teacher, each weighing 1: it is that teacher's share of the sum."""
        return {name: 1.0 for part in self.parts for name in part.weights}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """All supervised positions for every term, so that a row weighs as much as any other, whoever teaches it."""
        return dict.fromkeys(self.weights, len(supervised_positions(batch)[1]))


class ConfidenceWeightedTeachers(_RowWeightedObjective):
    """w_k(n) = p_k(y_n) / sum_j p_j(y_n), y_n being the true next token: of who knew it better, more is learnt.

    That is softmax_k of log p_k(y_n), p_k at the temperature of the loss, and of teachers that are equally likely
    beforehand the chance that k wrote y_n. A token that the student wrote is no truth: there all teachers weigh alike.
    What a cache or a server tells in part gives p_k(y_n) where y_n is among the tokens told, else an equal share of
    the mass of the others of its class.

    Each teacher's head is read twice: once for these weights, once for the loss.

    Source: Zhang, Chen and Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation" (arXiv:2201.00007), whose
    weights are (1 - softmax_k of -log p_k(y_n)) / (K - 1). Departs from the paper: with two teachers both are the
    same; with more, those leave the best one 1 / (K - 1) at most, however sure it is. Its features of middle layers
    are left out.
    """

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of the student and of every teacher at the same positions."""
        return {network: needs for part in self.parts for network, needs in part.needs(batch).items()}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """w_k D_k of each row, teacher by teacher."""
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
    """w_k(n) = 1 for the teacher of row n's document, as the batch's `routes` say, else 0.

    A teacher is asked about its own documents alone, and not at all in a pass that holds none of them.
    """

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """All of the student's rows, and each teacher's own."""
        positions = supervised_positions(batch)[0]
        teacher_needs = {part.teacher: Needs(positions & (batch["routes"] == k)) for k, part in enumerate(self.parts)}
        return {"student": Needs(positions), **teacher_needs}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """D_k of each of a teacher's own rows; of a teacher without any, 0."""
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
    """The objective of several teachers, from that of each."""
    builders: Mapping[str, Callable[[Sequence[LogitDistillation]], Objective]] = {
        "average": average_teachers,
        "confidence": ConfidenceWeightedTeachers,
        "route": RoutedTeachers,
    }
    if len(parts) < 2:
        raise UsageError(f"{len(parts)} teacher is not several; give --teacher more than once")
    return builders[ensemble.combination](parts)


def _make_partial_fn(input_fn: row_terms.RowInputFn, mask: Tensor) -> row_terms.RowInputFn:
    """What is said of rows a to b by one that knows its `own` rows alone, numbered among themselves."""
    offsets = torch.cat([mask.new_zeros(1, dtype=torch.long), mask.long().cumsum(0)])

    def read_rows(start: int, stop: int) -> RowSubset:
        first, last = int(offsets[start]), int(offsets[stop])
        values = input_fn(first, last)
        assert isinstance(values, Tensor | CoarseDistribution)
        return RowSubset(values, torch.where(mask[start:stop], offsets[start:stop] - first, -1))

    return read_rows


def _make_slice_fn(values: Float[Tensor, " N"]) -> row_terms.RowInputFn:
    return lambda start, stop: values[start:stop]
