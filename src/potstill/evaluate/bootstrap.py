"""Percentile bootstrap over documents, for ratios of sums and for the difference of two models on the same documents.

A measure such as bits per byte is `sum(numerators) / sum(denominators)`. Whole documents are drawn with replacement,
since the tokens of a document depend on each other and documents hardly do, and both sums are computed again. Two
models are compared on the same draws (paired), which cancels how hard the drawn documents are.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES

Array = Float[np.ndarray, " n"]
NUM_RESAMPLES = 2000
_MAX_INDICES = 1 << 22  # drawn at once, about 32 MiB


class Interval(NamedTuple):
    """A value and the 95 % interval around it; NaN bounds where there are fewer than two documents."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """a - b with its 95 % interval; `probability` is the share of draws with a < b (a tie counts half)."""

    value: float
    low: float
    high: float
    probability: float


def bootstrap_interval(
    numerators: Array,
    denominators: Array,
    *,
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """transform(sum(numerators) / sum(denominators)) with its interval; `transform` must be increasing, as exp is."""
    value = float(transform(np.asarray(numerators.sum() / denominators.sum())))
    if len(numerators) < 2:
        return Interval(value, float("nan"), float("nan"))
    numerator_sums, denominator_sums = _resample_sums(
        np.stack([numerators, denominators]), num_resamples=num_resamples, seed=seed
    )
    low, high = np.percentile(transform(_compute_ratios(numerator_sums, denominator_sums)), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def measure_ratio(
    name: str,
    numerators: Num[np.ndarray, " n"],
    denominators: Num[np.ndarray, " n"] | None = None,
    *,
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    count: int | None = None,
    note: str = "",
) -> Measure:
    """The measure `name`: `bootstrap_interval` of the ratio, without `denominators` of the mean.

    It has no bounds where there are fewer than two documents. Its `count` is that of the documents by default.
    """
    divisors = np.ones(len(numerators)) if denominators is None else denominators.astype(float)
    value, low, high = bootstrap_interval(numerators.astype(float), divisors, transform=transform)
    bounds = {} if math.isnan(low) else {"low": low, "high": high}
    return MEASURES[name].build(value, int((divisors > 0).sum()) if count is None else count, note=note, **bounds)


def paired_bootstrap(
    a: Array, b: Array, denominators: Array, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Difference:
    """sum(a) / sum(denominators) - sum(b) / sum(denominators) with its interval over shared draws of documents."""
    value = float((a.sum() - b.sum()) / denominators.sum())
    if len(a) < 2:
        return Difference(value, float("nan"), float("nan"), float("nan"))
    difference_sums, denominator_sums = _resample_sums(
        np.stack([a - b, denominators]), num_resamples=num_resamples, seed=seed
    )
    ratios = _compute_ratios(difference_sums, denominator_sums)
    low, high = np.percentile(ratios, [2.5, 97.5])
    probability = np.mean(ratios < 0) + np.mean(ratios == 0) / 2
    return Difference(value, float(low), float(high), float(probability))


def _compute_ratios(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """The ratio of each draw; draws of empty documents alone, with a denominator of 0, are left out."""
    is_nonzero = denominators > 0
    return np.asarray(numerators[is_nonzero] / denominators[is_nonzero])


def _resample_sums(columns: Float[np.ndarray, "k n"], *, num_resamples: int, seed: int) -> Float[np.ndarray, "k d"]:
    """The sum of each column over each of `num_resamples` draws of its documents."""
    return np.concatenate(
        [columns[:, indices].sum(-1) for indices in _draw_indices(columns.shape[1], num_resamples, seed)], axis=1
    )


def _draw_indices(n: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    batch_size = max(1, _MAX_INDICES // n)
    for start in range(0, num_resamples, batch_size):
        yield rng.integers(n, size=(min(batch_size, num_resamples - start), n))
