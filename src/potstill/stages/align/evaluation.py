"""Measures a policy on held-out preferences: the loss of its objective, and how it ranks the answers."""

from dataclasses import dataclass

import numpy as np
import torch

from potstill.core.counts import count_noun
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES
from potstill.core.screen import track
from potstill.core.types import REFERENCE, move_batch
from potstill.data.packing import Packs, collate
from potstill.evaluate.bootstrap import measure_ratio
from potstill.evaluate.preferences import PreferenceRecorder
from potstill.models.eval_mode import eval_mode
from potstill.objectives.weighted_sum import WeightedSum
from potstill.train.training_module import TrainingModule


@dataclass(frozen=True, kw_only=True)
class PreferenceEvaluator:
    """Measures a policy on held-out preferences, `count` pairs or answers in `packs`."""

    packs: Packs
    count: int

    @property
    def subject(self) -> str:
        """What the policy is measured on."""
        return count_noun(self.count, "preference")

    def measure(self, module: TrainingModule) -> list[Measure]:
        """`preference_loss`, and the measures of `evaluate.preferences`, each pack in one pass."""
        recorder = PreferenceRecorder(has_reference=REFERENCE in module.frozen_networks)
        recording = module.with_objective(WeightedSum((1.0, module.objective), (1.0, recorder)))
        device = next(module.student.parameters()).device
        sums, counts = [], []
        with eval_mode(module.student), torch.no_grad():
            for number in track(range(len(self.packs)), "held-out preferences"):
                batch = move_batch(collate([self.packs[number]]), device)
                sums.append(recording(**batch)["sums"].double().cpu().numpy())
                counts.append(recording.counts(batch).numpy())
        weights = np.array(list(recording.objective.weights.values()))
        return [measure_loss(np.array(sums), np.array(counts), weights), *recorder.join().measure()]


def measure_loss(sums: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> Measure:
    """sum_k w_k sum(sums_k) / sum(counts_k) over passes `[passes terms]`; of a single term with its interval."""
    (terms,) = np.nonzero(weights)
    if len(terms) == 1:
        (term,) = terms
        count = int(counts[:, term].sum())
        return measure_ratio("preference_loss", weights[term] * sums[:, term], counts[:, term], count=count)
    means = sums.sum(0) / np.maximum(counts.sum(0), 1)
    return MEASURES["preference_loss"].build(float(weights @ means), int(counts.sum(0).max()))
