"""AlignDistil: a policy learns, token by token, the extrapolation of two frozen policies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from potstill.core.errors import UsageError
from potstill.core.types import (
    BASELINE,
    MINUS,
    PLUS,
    REFERENCE,
    REJECTED,
    Batch,
    Needs,
    Objective,
    Signals,
    Terms,
    supervised_positions,
)
from potstill.objectives import row_terms
from potstill.objectives.answers import SIDES
from potstill.objectives.cost import CostInputs, ObjectiveCost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops.extrapolate import ExtrapolationRows
from potstill.ops.precision import get_wide_dtype
from potstill.ops.row_loss import Constants, Weighted
from potstill.ops.row_spans import LikelihoodInputs

OFFICIAL = "official"  # the value of `compat` that reproduces the released code
METRICS = ("chosen_log_p", "chosen_tokens")


@dataclass(frozen=True, kw_only=True)
class AlignDistil(row_terms.RowObjectiveMixin):
    """sum over answers of 1 / |y| sum over their tokens of beta / alpha KL(q || p*); see `ops.extrapolate`.

    p* extrapolates the frozen networks of `extrapolation`, alpha is adaptive or constant, and neither has a gradient.
    With `mean` "tokens" it is a sum over tokens without 1 / |y|; the loss then counts tokens instead of answers.

    It trains on every answer that is not on the side `REJECTED` or `BASELINE`: the chosen ones (off-policy), and
    completions that the policy samples in the run (on-policy; `sampled`). Every token of an answer is trained, from the
    first one to its end token. Metrics are the log-probability and the length of an answer, as means over answers.

    Source: Zhang et al., "AlignDistil" (arXiv:2503.02832). Departs from the authors' code, which never trains the first
    token of an answer, and trains the position after the last one. With `skips_first` the first token is left out;
    the position after the last token has no target in a batch.
    """

    extrapolation: ExtrapolationRows = field(default_factory=ExtrapolationRows)
    mean: Literal["sequences", "tokens"] = "sequences"
    skips_first: bool = False
    name: str = "aligndistil"
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """The loss with weight 1, and metrics with weight 0."""
        return {self.name: 1.0, **dict.fromkeys(METRICS, 0.0)}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of the student and of both frozen networks at the supervised positions."""
        needs = Needs(supervised_positions(batch)[0])
        return dict.fromkeys(("student", self.extrapolation.plus, self.extrapolation.minus), needs)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of answers, or of their trained tokens."""
        documents, is_trained = supervised_positions(batch)[2], self.select_rows(batch)
        num_answers = len(documents[is_trained].unique())
        count = num_answers if self.mean == "sequences" else int(is_trained.sum())
        return {self.name: count, **dict.fromkeys(METRICS, num_answers)}

    def split(
        self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch
    ) -> tuple[Mapping[str, row_terms.RowTerm], Terms]:
        """The loss and the log-probabilities as sums over rows."""
        is_trained, weights_key = self.select_rows(batch), f"{self.name}_weights"
        row_weights = self.compute_weights(batch, get_wide_dtype(views["student"].rows.dtype))
        networks = {name: frozen[name] for name in (self.extrapolation.plus, self.extrapolation.minus)}
        inputs: dict[str, row_terms.RowInputFn] = {
            weights_key: lambda start, stop: row_weights[start:stop],
            **{name: row_terms.make_logits_fn(signals) for name, signals in networks.items()},
        }

        def compute(start: int, log_q: Float[Tensor, " C"]) -> Mapping[str, Tensor]:
            mask = is_trained[start : start + len(log_q)].to(log_q.dtype)
            return dict(zip(METRICS, (log_q * mask, mask), strict=True))

        likelihoods = LikelihoodInputs(torch.arange(len(is_trained), device=is_trained.device), compute)
        terms = {name: row_terms.RowTerm(Constants(name), likelihoods=likelihoods) for name in METRICS}
        return {self.name: row_terms.RowTerm(Weighted(self.extrapolation, weights_key), inputs), **terms}, {}

    def select_rows(self, batch: Batch) -> Bool[Tensor, " N"]:
        """True at the supervised rows that are trained on."""
        documents = supervised_positions(batch)[2]
        is_trained = torch.ones_like(documents, dtype=torch.bool)
        if SIDES in batch:
            sides = batch[SIDES][documents]
            is_trained = (sides != REJECTED) & (sides != BASELINE)
        if self.skips_first:
            is_trained[:1] = False
            is_trained[1:] &= documents[1:] == documents[:-1]
        return is_trained

    def compute_weights(self, batch: Batch, dtype: torch.dtype) -> Float[Tensor, " N"]:
        """1 / |y| or 1 at the rows that are trained on, 0 at all others."""
        documents, is_trained = supervised_positions(batch)[2], self.select_rows(batch)
        if self.mean == "tokens":
            return is_trained.to(dtype)
        _, answer = documents.unique(return_inverse=True)
        lengths = torch.zeros_like(answer).index_add(0, answer, is_trained.long())
        return is_trained.to(dtype) / lengths[answer].clamp(min=1)


def choose_networks(numeric_options: Mapping[str, float]) -> tuple[str, ...]:
    """The frozen networks: with `contrast` both policies, else the policy of preferences and the reference."""
    return (PLUS, MINUS if numeric_options["contrast"] else REFERENCE)


def aligndistil_cost(inputs: CostInputs) -> ObjectiveCost:
    """The logits of all frozen networks at each row, two of which are alive."""
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 2))


@register_objective(
    "aligndistil",
    help="The extrapolation of two policies, token by token, from chosen or sampled answers (AlignDistil).",
    cost=aligndistil_cost,
    uses_teacher=False,
    needs_teacher_model=False,
    supports_cross_tokenizer=True,
    networks=choose_networks,
    data="preferences",
    numeric_options={"beta": 0.1, "ratio": 20.0, "epsilon": 1e-3, "adaptive": 1.0, "weight": 1.0, "contrast": 1.0},
    text_options=("mean", "compat"),
)
def build_aligndistil(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`AlignDistil`; without `adaptive`, alpha is the constant `weight`.

    `compat` "official" reproduces the authors' code: twice the `ratio`, since its TVD lacks the factor 1/2, and no
    first token.
    """
    mean, compat = options.text_options.get("mean", "sequences"), options.text_options.get("compat", "")
    if mean not in ("sequences", "tokens"):
        raise UsageError(f"{options.name}: mean is {mean!r}; choose sequences or tokens")
    if compat not in ("", OFFICIAL):
        raise UsageError(f"{options.name}: compat is {compat!r}; choose {OFFICIAL}, or omit it")
    is_official, ratio, epsilon = compat == OFFICIAL, options.get_nonnegative("ratio"), options.get_positive("epsilon")
    if not options.get_flag("adaptive"):
        ratio, epsilon = 0.0, options.get_positive("weight")
    plus, minus = choose_networks(options.numeric_options)
    extrapolation = ExtrapolationRows(
        plus=plus,
        minus=minus,
        beta=options.get_positive("beta"),
        ratio=2 * ratio if is_official else ratio,
        epsilon=epsilon,
        contrast=options.get_flag("contrast"),
    )
    return AlignDistil(
        extrapolation=extrapolation,
        mean="tokens" if mean == "tokens" else "sequences",
        skips_first=is_official,
        name=options.name,
    )
