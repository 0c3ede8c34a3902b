"""Percentile bootstrap over documents, for ratios of sums and for the difference of two models on the same documents.

A measure such as bits per byte is `sum(numerators) / sum(denominators)`, so whole documents are drawn with replacement
and both sums are taken again: tokens of one document are not independent, documents nearly are. For two models the same
draw serves both (paired), which cancels how hard the drawn documents are.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Array = Float[np.ndarray, " n"]
DRAWS = 2000
_AT_ONCE = 1 << 22  # indices in memory at once, about 32 MiB


class Interval(NamedTuple):
    """A value and the 95 % interval around it; NaN bounds where there are fewer than two documents."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """a - b with its 95 % interval; `probability` is the share of draws in which a is below b (a tie counts half)."""

    value: float
    low: float
    high: float
    probability: float


def interval(
    numerators: Array,
    denominators: Array,
    *,
    transform: Callable[[np.ndarray], np.ndarray] = np.asarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """transform(sum(numerators) / sum(denominators)) with its interval; `transform` is increasing, as exp is."""
    value = float(transform(np.asarray(numerators.sum() / denominators.sum())))
    if len(numerators) < 2:
        return Interval(value, float("nan"), float("nan"))
    above, below = _draw(np.stack([numerators, denominators]), draws=draws, seed=seed)
    low, high = np.percentile(transform(_ratio(above, below)), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def paired(a: Array, b: Array, denominators: Array, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """sum(a) / sum(denominators) - sum(b) / sum(denominators), drawn over the same documents for both."""
    value = float((a.sum() - b.sum()) / denominators.sum())
    if len(a) < 2:
        return Difference(value, float("nan"), float("nan"), float("nan"))
    gap, below = _draw(np.stack([a - b, denominators]), draws=draws, seed=seed)
    drawn = _ratio(gap, below)
    low, high = np.percentile(drawn, [2.5, 97.5])
    probability = np.mean(drawn < 0) + np.mean(drawn == 0) / 2
    return Difference(value, float(low), float(high), float(probability))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below over the draws that hold anything to divide by (a draw of empty documents alone does not)."""
    filled = below > 0
    return np.asarray(above[filled] / below[filled])


def _draw(columns: Float[np.ndarray, "k n"], *, draws: int, seed: int) -> Float[np.ndarray, "k d"]:
    """The sum of each column over each of `draws` resamples of its documents."""
    return np.concatenate([columns[:, chosen].sum(-1) for chosen in _chosen(columns.shape[1], draws, seed)], axis=1)


def _chosen(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // n)
    for first in range(0, draws, at_once):
        yield rng.integers(n, size=(min(at_once, draws - first), n))
