"""Objectives of preferences: DPO, IPO, SimPO and ORPO over pairs of answers, and KTO over answers with a label."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.core.errors import DataError
from potstill.core.types import BASELINE, CHOSEN, REFERENCE, REJECTED, Batch, Objective
from potstill.objectives.answers import AnswerObjective, AnswerSums, Items, get_sides
from potstill.objectives.cost import CostInputs, ObjectiveCost, no_cost
from potstill.objectives.model_info import PairInfo
from potstill.objectives.spec import ObjectiveOptions, register_objective
from potstill.ops import preference
from potstill.ops.likelihood import sum_groups
from potstill.ops.preference import Side

PAIRS = "pairs"  # the key of a batch: documents of the chosen and of the rejected side of each pair
SIDE_METRICS = ("chosen_log_p", "rejected_log_p", "chosen_tokens", "rejected_tokens")
PAIR_DEFAULTS = {"nll": 0.0, "swap": 0.0}  # options of every loss of pairs


class PairLoss(NamedTuple):
    """A loss of pairs, and the margin that is positive where the policy prefers the chosen side."""

    loss: Callable[[Side, Side], Tensor]
    margin: Callable[[Side, Side], Tensor]
    uses_reference: bool = True


@dataclass(frozen=True, kw_only=True)
class PairObjective(AnswerObjective):
    """sum over pairs of loss(chosen, rejected) + nll * -log pi(y_w|x) / |y_w|; see `ops.preference` for the losses.

    The `nll` is CM-Align's gamma (arXiv:2509.08541): the chosen answer's cross-entropy per token. With `swap` the sides
    change places everywhere, metrics included, so that DPO trains the reverse policy of AlignDistil (arXiv:2503.02832).

    Pairs are documents of one group, on the sides `CHOSEN` and `REJECTED` (`core.types`); the loss counts pairs. Each
    is a function of its own answers alone, so the loss is additive. Metrics are means over pairs. `accuracy` is the
    share of pairs with a positive `margin`, a tie counting one half. `kl` is the mean of log pi(y|x) - log pi_ref(y|x)
    over both answers. That is an estimate of KL(pi || pi_ref) only on text that the policy wrote.
    """

    pair_loss: PairLoss
    nll: float = 0.0
    swap: bool = False
    name: str = "dpo"
    additive: ClassVar[bool] = True

    @property
    def reference(self) -> str | None:
        """The frozen network, for a loss that compares with one."""
        return REFERENCE if self.pair_loss.uses_reference else None

    @property
    def metrics(self) -> Sequence[str]:
        """The names of the metrics."""
        return ("margin", "accuracy", *SIDE_METRICS, *(["kl"] if self.pair_loss.uses_reference else []))

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of pairs."""
        return dict.fromkeys(self.weights, get_pairs(batch, self.name).shape[1])

    def find_items(self, batch: Batch) -> Items:
        """The pairs, each a set of two documents."""
        pairs = get_pairs(batch, self.name)
        sets = torch.full_like(get_sides(batch, self.name), -1)
        numbers = torch.arange(pairs.shape[1], device=pairs.device)
        sets[pairs] = numbers.expand(2, -1)
        return Items((pairs.flip(0) if self.swap else pairs).T, sets)

    def measure(
        self, sums: AnswerSums, documents: Int[Tensor, "P K"], items: Items, batch: Batch
    ) -> Mapping[str, Float[Tensor, " P"]]:
        """The loss and the metrics of pairs."""
        chosen, rejected = (sums.select(side) for side in documents.unbind(1))
        margin = self.pair_loss.margin(chosen, rejected)
        metrics = {
            "margin": margin,
            "accuracy": rate_margin(margin),
            "chosen_log_p": chosen.policy,
            "rejected_log_p": rejected.policy,
            "chosen_tokens": chosen.tokens,
            "rejected_tokens": rejected.tokens,
            "kl": (chosen.log_ratio + rejected.log_ratio) / 2,
        }
        loss = self.pair_loss.loss(chosen, rejected)
        loss = loss - self.nll * chosen.token_log_p if self.nll else loss
        return {self.name: loss, **{name: metrics[name] for name in self.metrics}}


@dataclass(frozen=True, kw_only=True)
class LabelObjective(AnswerObjective):
    """KTO: sum over answers of 1 - sigma(beta (r - z)) if desirable, weight (1 - sigma(beta (z - r))) if not.

        r = log pi(y|x) - log pi_ref(y|x)        z = max(0, mean of r over the BASELINE documents of the answer's group)

    Sides are `CHOSEN` (desirable), `REJECTED` (undesirable) and `BASELINE`, a prompt with the answer of another one,
    whose log-probabilities have no gradient. An answer whose group has no such document has z = 0. The loss counts
    answers with a label. Source: Ethayarajh et al. (arXiv:2402.01306), section 4, with lambda_U / lambda_D = `weight`.

    Departs from the paper and TRL, whose z is the mean over a whole micro-batch. Then the loss depends on how a step is
    split into passes and over devices. Here a group is the micro-batch of the paper: it stays in one pass, so the loss
    is additive. A group of several answers has a better estimate of z.
    """

    beta: float = 0.1
    weight: float = 1.0
    name: str = "kto"
    additive: ClassVar[bool] = True

    @property
    def reference(self) -> str:
        """The frozen network."""
        return REFERENCE

    @property
    def metrics(self) -> Sequence[str]:
        """The names of the metrics."""
        return ("margin", "accuracy", *SIDE_METRICS, "kl", "baseline")

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """The number of answers with a label; for a metric of one side, of that side."""
        sides = get_sides(batch, self.name)
        num_chosen, num_rejected = (int((sides == side).sum()) for side in (CHOSEN, REJECTED))
        by_side = {"chosen": num_chosen, "rejected": num_rejected}
        return {name: by_side.get(name.partition("_")[0], num_chosen + num_rejected) for name in self.weights}

    def find_items(self, batch: Batch) -> Items:
        """The answers with a label; a group, or a document outside all groups, is a set."""
        sides = get_sides(batch, self.name)
        numbers = torch.arange(len(sides), device=sides.device)
        groups = batch.get("groups", torch.full_like(sides, -1))
        sets = torch.where(groups >= 0, groups, len(sides) + numbers)
        is_labeled = (sides == CHOSEN) | (sides == REJECTED)
        return Items(numbers[is_labeled][:, None], sets.masked_fill(sides < 0, -1))

    def measure(
        self, sums: AnswerSums, documents: Int[Tensor, "P K"], items: Items, batch: Batch
    ) -> Mapping[str, Float[Tensor, " P"]]:
        """The loss and the metrics of answers."""
        answers, is_chosen = sums.select(documents[:, 0]), get_sides(batch, self.name)[documents[:, 0]] == CHOSEN
        baseline = self.compute_baselines(sums, items.sets, get_sides(batch, self.name))[items.sets[documents[:, 0]]]
        margin = preference.kto_margin(answers, is_chosen, baseline, beta=self.beta)
        loss = preference.kto(answers, is_chosen, baseline, beta=self.beta)
        return {
            self.name: torch.where(is_chosen, loss, self.weight * loss),
            "margin": margin,
            "accuracy": rate_margin(margin),
            "chosen_log_p": answers.policy * is_chosen,
            "rejected_log_p": answers.policy * ~is_chosen,
            "chosen_tokens": answers.tokens * is_chosen,
            "rejected_tokens": answers.tokens * ~is_chosen,
            "kl": answers.log_ratio,
            "baseline": baseline,
        }

    def compute_baselines(
        self, sums: AnswerSums, sets: Int[Tensor, " D"], sides: Int[Tensor, " D"]
    ) -> Float[Tensor, " G"]:
        """z of each set of documents, without a gradient; 0 for a set without a baseline."""
        numbers, num_sets = sets[sides == BASELINE], int(sets.max()) + 1
        log_ratios = (sums.policy - sums.reference).detach()[sides == BASELINE]
        totals = sum_groups(log_ratios, numbers, num_sets)
        return (totals / torch.bincount(numbers, minlength=num_sets).clamp(min=1)).clamp(min=0)


def rate_margin(margin: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """1 for a positive margin, 0 for a negative one, 1/2 for a tie."""
    return (margin.sign() + 1) / 2


def get_pairs(batch: Batch, name: str) -> Int[Tensor, "2 P"]:
    """The chosen and the rejected document of each pair.

    Raises: DataError for a batch without pairs, which the objective `name` cannot train on.
    """
    if PAIRS not in batch:
        raise DataError(f"the batch has no pairs of answers; train {name} on preferences, by potstill align")
    return batch[PAIRS]


def reference_cost(inputs: CostInputs) -> ObjectiveCost:
    """The reference's logits of each row."""
    return ObjectiveCost(teacher_products=inputs.rows, logit_copies=(0, 1))


def build_pairs(options: ObjectiveOptions, pair_loss: PairLoss) -> PairObjective:
    """The objective of a loss of pairs, with the options that all of them have."""
    nll, swap = options.get_nonnegative("nll"), options.get_flag("swap")
    return PairObjective(pair_loss=pair_loss, nll=nll, swap=swap, name=options.name)


PAIR_FACTS = {"uses_teacher": False, "needs_teacher_model": False, "supports_cross_tokenizer": True}


@register_objective(
    "dpo",
    help="Direct preference optimization of pairs of answers, with a reference (DPO; cDPO with smoothing).",
    cost=reference_cost,
    networks=(REFERENCE,),
    data="preferences",
    numeric_options={"beta": 0.1, "smoothing": 0.0, **PAIR_DEFAULTS},
    **PAIR_FACTS,
)
def build_dpo(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`PairObjective` with the loss of DPO."""
    beta, smoothing = options.get_positive("beta"), options.get_nonnegative("smoothing", below=0.5)
    loss = partial(preference.dpo, beta=beta, smoothing=smoothing)
    return build_pairs(options, PairLoss(loss, partial(preference.dpo_margin, beta=beta)))


@register_objective(
    "ipo",
    help="Identity preference optimization of pairs of answers, per token, with a reference (IPO).",
    cost=reference_cost,
    networks=(REFERENCE,),
    data="preferences",
    numeric_options={"beta": 0.1, **PAIR_DEFAULTS},
    **PAIR_FACTS,
)
def build_ipo(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`PairObjective` with the loss of IPO."""
    loss = partial(preference.ipo, beta=options.get_positive("beta"))
    return build_pairs(options, PairLoss(loss, preference.ipo_margin))


@register_objective(
    "simpo",
    help="Simple preference optimization of pairs of answers, per token, without a reference (SimPO).",
    cost=no_cost,
    data="preferences",
    numeric_options={"beta": 2.0, "gamma": 1.0, **PAIR_DEFAULTS},
    **PAIR_FACTS,
)
def build_simpo(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`PairObjective` with the loss of SimPO."""
    beta, gamma = options.get_positive("beta"), options.get_nonnegative("gamma")
    loss = partial(preference.simpo, beta=beta, gamma=gamma)
    return build_pairs(options, PairLoss(loss, partial(preference.simpo_margin, beta=beta), uses_reference=False))


@register_objective(
    "orpo",
    help="Cross-entropy of the chosen answer with its odds ratio to the rejected one, without a reference (ORPO).",
    cost=no_cost,
    data="preferences",
    numeric_options={"weight": 0.1, **PAIR_DEFAULTS},
    **PAIR_FACTS,
)
def build_orpo(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`PairObjective` with the loss of ORPO."""
    loss = partial(preference.orpo, weight=options.get_positive("weight"))
    return build_pairs(options, PairLoss(loss, preference.orpo_margin, uses_reference=False))


@register_objective(
    "kto",
    help="Kahneman-Tversky optimization of single answers that are desirable or not, with a reference (KTO).",
    cost=reference_cost,
    networks=(REFERENCE,),
    data="labels",
    numeric_options={"beta": 0.1, "weight": 1.0},
    **PAIR_FACTS,
)
def build_kto(pair: PairInfo | None, options: ObjectiveOptions) -> Objective:
    """`LabelObjective`; `weight` multiplies the loss of undesirable answers."""
    beta, weight = options.get_positive("beta"), options.get_nonnegative("weight")
    return LabelObjective(beta=beta, weight=weight, name=options.name)
