"""Measures how a model ranks the two answers of held-out preferences, beside two baselines that need no training.

    r(y)      = log pi(y | x) - log pi_ref(y | x)          the implied reward, without its factor beta
    accuracy  = share of the pairs with r(chosen) > r(rejected); equal rewards count half
    margin    = mean of r(chosen) - r(rejected), in nats
    KL        = mean over the tokens of chosen answers of sum over v of pi log(pi / pi_ref), exact at each position

Source: Rafailov et al., "Direct Preference Optimization" (arXiv:2305.18290), section 5. A model can be right in more
than half of the pairs without having learned what they prefer: by the likelihood that it gives an answer before any
training (`likelihood_accuracy`), or because the shorter answer is chosen more often (`shorter_accuracy`).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from potstill.core.measure import Measure
from potstill.core.types import (
    CHOSEN,
    NEXT_TOKEN_LOG_P,
    REFERENCE,
    REJECTED,
    Batch,
    Needs,
    Signals,
    Terms,
    supervised_positions,
)
from potstill.data.pack_fields import SIDES
from potstill.data.shared_prompts import PAIRS
from potstill.evaluate.bootstrap import measure_ratio, paired_bootstrap
from potstill.models.inference import inference_context
from potstill.models.signals import compute_signals
from potstill.objectives.row_terms import compute_target_log_probs
from potstill.ops.divergence import forward_kl
from potstill.ops.likelihood import sum_groups

CHUNK = 256  # rows whose logits are in memory at once
STUDENT = "student"


@dataclass(frozen=True)
class PreferenceScores:
    """For each answer its log-probability under the model and the reference, in nats, and its tokens.

    `sides` are those of `core.types`, and `pairs` number the chosen and the rejected answer of each pair. `kl` sums the
    exact divergence over the tokens of chosen answers; it is 0 for others. Without a reference both are NaN.
    """

    sides: Int[np.ndarray, " D"]
    pairs: Int[np.ndarray, "2 P"]
    log_p: Float[np.ndarray, " D"]
    reference_log_p: Float[np.ndarray, " D"]
    tokens: Float[np.ndarray, " D"]
    kl: Float[np.ndarray, " D"]

    @property
    def rewards(self) -> Float[np.ndarray, " D"]:
        """The log-ratio of each answer."""
        return np.asarray(self.log_p - self.reference_log_p)

    def measure(self) -> list[Measure]:
        """All measures that these scores allow, with intervals over pairs or answers."""
        return [*self._measure_rewards(), *self._measure_answers(), *self._measure_baselines()]

    def _measure_rewards(self) -> list[Measure]:
        measures = []
        chosen, rejected = self.rewards[self.pairs]
        if len(chosen) and np.isfinite(chosen).all():
            measures += [
                measure_ratio("reward_accuracy", _compare(chosen, rejected)),
                measure_ratio("reward_margin", chosen - rejected),
            ]
        is_chosen = self.sides == CHOSEN
        if is_chosen.any() and np.isfinite(self.kl[is_chosen]).all():
            measures.append(measure_ratio("reference_kl", self.kl[is_chosen], self.tokens[is_chosen]))
        return measures

    def _measure_answers(self) -> list[Measure]:
        """The mean log-probability and length of chosen and of rejected answers."""
        measures = []
        for name, side in (("chosen", CHOSEN), ("rejected", REJECTED)):
            if (is_side := self.sides == side).any():
                measures.append(measure_ratio(f"{name}_log_p", self.log_p[is_side]))
                measures.append(measure_ratio(f"{name}_tokens", self.tokens[is_side]))
        return measures

    def _measure_baselines(self) -> list[Measure]:
        """The accuracies of the likelier and of the shorter answer."""
        if not self.pairs.size:
            return []
        likelihoods, lengths = self.log_p[self.pairs], self.tokens[self.pairs]
        return [
            measure_ratio("likelihood_accuracy", _compare(*likelihoods)),
            measure_ratio("shorter_accuracy", _compare(*-lengths)),
        ]


def _compare(first: Float[np.ndarray, " P"], second: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
    """1 where the first value is larger, 1/2 where both are equal, else 0."""
    return np.asarray((first > second) + (first == second) / 2)


@dataclass(kw_only=True)
class PreferenceRecorder:
    """Records the scores of every answer that passes, as an objective without terms.

    In a `WeightedSum` it shares the forward passes of a loss. `has_reference` tells whether the batch is compared with
    the frozen network `reference`.
    """

    has_reference: bool = True
    parts: list[PreferenceScores] = field(default_factory=list)
    additive: ClassVar[bool] = True

    @property
    def weights(self) -> Mapping[str, float]:
        """No terms."""
        return {}

    def needs(self, batch: Batch) -> Mapping[str, Needs]:
        """The rows of all answers."""
        needs = Needs(supervised_positions(batch)[0])
        return {STUDENT: needs, **({REFERENCE: needs} if self.has_reference else {})}

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """No terms."""
        return {}

    @torch.no_grad()
    def __call__(self, views: Mapping[str, Signals], frozen: Mapping[str, Signals], batch: Batch) -> Terms:
        """Record the answers of the batch."""
        _, targets, owners = supervised_positions(batch)
        sides, student, reference = batch[SIDES.name], views[STUDENT], frozen.get(REFERENCE)
        total = len(sides)
        log_p = sum_groups(compute_target_log_probs(student, targets).double(), owners, total)
        reference_log_p, kl = torch.full_like(log_p, torch.nan), torch.full_like(log_p, torch.nan)
        if reference is not None:
            reference_log_p = sum_groups(compute_target_log_probs(reference, targets).double(), owners, total)
            if NEXT_TOKEN_LOG_P not in reference.scores:  # a cache of log-probabilities has no distributions
                kl = sum_groups(_compute_kl(student, reference, sides[owners] == CHOSEN), owners, total)
        tokens = sum_groups(torch.ones_like(targets, dtype=torch.float64), owners, total)
        arrays = (sides, batch[PAIRS], log_p, reference_log_p, tokens, kl)
        self.parts.append(PreferenceScores(*(values.cpu().numpy() for values in arrays)))
        return {}

    def join(self) -> PreferenceScores:
        """The scores of all batches so far."""
        return join_scores(self.parts)


def score_preferences(
    model: PreTrainedModel, reference: PreTrainedModel, batches: Iterable[Batch], *, vocabulary: int, dtype: torch.dtype
) -> PreferenceScores:
    """The scores of `model` and `reference` on packed batches of preferences, with products in `dtype`."""
    recorder = PreferenceRecorder()
    for batch in batches:
        signals = {}
        for name, network in ((STUDENT, model), (REFERENCE, reference)):
            with inference_context(network, dtype=dtype):
                needs = recorder.needs(batch)[name]
                signals[name] = compute_signals(network, batch, needs, vocabulary=vocabulary)
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != model.dtype):
            recorder(signals, signals, batch)
    return recorder.join()


def compare_preferences(scores: Mapping[str, PreferenceScores]) -> list[dict[str, Any]]:
    """For every two models, a - b of accuracy and margin by the paired bootstrap over pairs.

    `probability` is the share of draws with a < b.
    """
    differences = []
    for (a, first), (b, second) in itertools.combinations(scores.items(), 2):
        rewards = [part.rewards[part.pairs] for part in (first, second)]
        values = {
            "reward_accuracy": [_compare(chosen, rejected) for chosen, rejected in rewards],
            "reward_margin": [chosen - rejected for chosen, rejected in rewards],
        }
        for name, (first_values, second_values) in values.items():
            if len(first_values):
                difference = paired_bootstrap(first_values, second_values, np.ones_like(first_values))
                differences.append({"name": name, "a": a, "b": b, **difference._asdict()})
    return differences


def join_scores(parts: Sequence[PreferenceScores]) -> PreferenceScores:
    """The scores of several batches end to end, with the pairs numbered on."""
    starts = np.cumsum([0, *(len(part.sides) for part in parts[:-1])])
    pairs = np.concatenate([part.pairs + start for part, start in zip(parts, starts, strict=True)], axis=1)
    columns = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("sides", "log_p", "reference_log_p", "tokens", "kl")
    }
    return PreferenceScores(pairs=pairs, **columns)


def _compute_kl(student: Signals, reference: Signals, is_selected: Bool[Tensor, " N"]) -> Float[Tensor, " N"]:
    """KL(student || reference) in nats at the selected rows, and 0 at all others."""
    indices = is_selected.nonzero()[:, 0]
    divergences = torch.zeros(len(is_selected), dtype=torch.float64, device=is_selected.device)
    for chunk in indices.split(CHUNK):
        p, q = (signals.logits(signals.rows[chunk]).float() for signals in (student, reference))
        divergences[chunk] = forward_kl(p, q).double()
    return divergences
