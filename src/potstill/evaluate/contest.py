"""One method against another, each with several seeds, on the same documents: better, worse, or not told apart.

Two things blur a difference: which documents it was measured on, and which seed the training had. A method counts as
better only where it is so beyond both: the paired bootstrap over documents of the difference averaged over the seeds
leaves 0 outside its 95 % interval, and the difference has the same sign in every seed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from potstill.evaluate.bootstrap import Array, Difference, paired
from potstill.evaluate.measure import Judged, comparable

BETTER, WORSE, EQUAL = "better", "worse", "not told apart"
HIGHER = ("teacher_agreement", "rouge_l")  # of what is compared, where more is better


class Contest(NamedTuple):
    """What `a` has more than `b` of a measure: averaged over the seeds, and seed by seed, with the verdict and why."""

    name: str
    pooled: Difference
    seeds: tuple[Difference, ...]
    verdict: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        seeds = [_plain(one) for one in self.seeds]
        return {"name": self.name, **_plain(self.pooled), "seeds": seeds, "verdict": self.verdict, "why": self.why}


def contests(ours: Sequence[Judged], theirs: Sequence[Judged]) -> list[Contest]:
    """The first method against the second, seed by seed in the same order, in every measure that both have."""
    seeds = [{name: columns for name, *columns in _columns(a, b)} for a, b in zip(ours, theirs, strict=True)]
    names = [name for name in seeds[0] if all(name in seed for seed in seeds)]
    return [_contest(name, [seed[name] for seed in seeds]) for name in names]


def verdict(pooled: Difference, seeds: Sequence[float], *, better: str) -> tuple[str, str]:
    """(better, worse or not told apart, and why) of a difference and what it was in each seed."""
    if not (pooled.low > 0 or pooled.high < 0):  # also where there is no interval
        return EQUAL, "documents differ by as much"
    if any(np.sign(one) != np.sign(pooled.value) for one in seeds):
        return EQUAL, "seeds differ by as much"
    won = (pooled.value > 0) == (better == "higher")
    return (BETTER if won else WORSE), "on one seed alone" if len(seeds) == 1 else f"in all {len(seeds)} seeds"


def _contest(name: str, seeds: Sequence[Sequence[Array]]) -> Contest:
    """`seeds` are (sums of one, sums of the other, what both are divided by), which is the same in every seed."""
    ours, theirs, below = (np.mean(column, axis=0) for column in zip(*seeds, strict=True))
    pooled, each = paired(ours, theirs, below), tuple(paired(*one) for one in seeds)
    better = "higher" if name in HIGHER else "lower"
    return Contest(name, pooled, each, *verdict(pooled, [one.value for one in each], better=better))


def _plain(found: Difference) -> dict[str, float | None]:
    """A difference of one document has no interval."""
    return {name: None if np.isnan(value) else value for name, value in found._asdict().items()}


def _columns(a: Judged, b: Judged) -> Iterator[tuple[str, Array, Array, Array]]:
    yield from comparable(a.seen, b.seen)
    if a.answers is not None and b.answers is not None and len(a.answers.rouge_l) == len(b.answers.rouge_l):
        yield "rouge_l", a.answers.rouge_l, b.answers.rouge_l, np.ones_like(a.answers.rouge_l)
