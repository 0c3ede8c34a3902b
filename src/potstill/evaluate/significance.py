"""Compares two methods, each with several seeds, on the same documents: better, worse or inconclusive.

A difference depends on the measured documents and on the seed of the training. A method counts as better only where
neither explains the difference: the 95 % interval of the difference, averaged over the seeds and bootstrapped over
documents, excludes 0, and the difference has the same sign in every seed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from potstill.core.measure_table import MEASURES
from potstill.evaluate.bootstrap import Array, Difference, paired_bootstrap
from potstill.evaluate.measures import ModelEvaluation, iterate_comparable_sums

BETTER, WORSE, INCONCLUSIVE = "better", "worse", "not told apart"


class MethodComparison(NamedTuple):
    """The difference a - b of a measure, averaged over the seeds and for each seed, with the verdict and its reason."""

    name: str
    mean_difference: Difference
    seed_differences: tuple[Difference, ...]
    verdict: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        seeds = [_to_plain_dict(difference) for difference in self.seed_differences]
        return {
            "name": self.name,
            **_to_plain_dict(self.mean_difference),
            "seeds": seeds,
            "verdict": self.verdict,
            "why": self.reason,
        }


def compare_methods(first: Sequence[ModelEvaluation], second: Sequence[ModelEvaluation]) -> list[MethodComparison]:
    """Compare the first method with the second in every measure that both have; seeds are in the same order."""
    seeds = [{name: columns for name, *columns in _iterate_columns(a, b)} for a, b in zip(first, second, strict=True)]
    names = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    return [_compare_measure(name, [seed[name] for seed in seeds]) for name in names]


def decide_verdict(mean_difference: Difference, seed_values: Sequence[float], *, better: str) -> tuple[str, str]:
    """(verdict, reason) for a mean difference and its value in each seed."""
    if not (mean_difference.low > 0 or mean_difference.high < 0):  # or the bounds are NaN
        return INCONCLUSIVE, "documents differ by as much"
    if any(np.sign(value) != np.sign(mean_difference.value) for value in seed_values):
        return INCONCLUSIVE, "seeds differ by as much"
    is_better = (mean_difference.value > 0) == (better == "higher")
    return (BETTER if is_better else WORSE), "on one seed alone" if len(
        seed_values
    ) == 1 else f"in all {len(seed_values)} seeds"


def _compare_measure(name: str, seeds: Sequence[Sequence[Array]]) -> MethodComparison:
    """Compare one measure; each of `seeds` is (sums of a, sums of b, denominators), with equal denominators."""
    first_sums, second_sums, denominators = (np.mean(column, axis=0) for column in zip(*seeds, strict=True))
    mean_difference, seed_differences = (
        paired_bootstrap(first_sums, second_sums, denominators),
        tuple(paired_bootstrap(*seed) for seed in seeds),
    )
    return MethodComparison(
        name,
        mean_difference,
        seed_differences,
        *decide_verdict(mean_difference, [seed.value for seed in seed_differences], better=MEASURES[name].better),
    )


def _to_plain_dict(difference: Difference) -> dict[str, float | None]:
    """A plain dictionary; the bounds of a difference on one document, which has no interval, are None."""
    return {name: None if np.isnan(value) else value for name, value in difference._asdict().items()}


def _iterate_columns(a: ModelEvaluation, b: ModelEvaluation) -> Iterator[tuple[str, Array, Array, Array]]:
    yield from iterate_comparable_sums(a.text_scores, b.text_scores)
    if a.answers is not None and b.answers is not None and len(a.answers.rouge_l) == len(b.answers.rouge_l):
        yield "rouge_l", a.answers.rouge_l, b.answers.rouge_l, np.ones_like(a.answers.rouge_l)
