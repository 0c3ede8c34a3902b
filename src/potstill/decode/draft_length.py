"""How many tokens to draft: always the same number, or the number that pays by the acceptance and times measured here.

A draft of g tokens gives 1 + sum_{i <= g} prod_{j <= i} a_j tokens in a time of g c + v(g). a_j is the share of drafts
that keep token j among those that keep all before it, c the time of a draft token, and v(g) that of a pass of the
target over g + 1 tokens. `CostLength` estimates all three while it decodes, and takes the g with the most tokens per
second; 0 where no draft pays.

Source: Leviathan et al. (arXiv:2211.17192), section 3.5, where all a_j are equal and v does not depend on g.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from potstill.ops.acceptance import compute_mean_tokens_by_position, divide_by_cost

DECAY = 0.98  # of an older pass in the means
FIRST_RATE = 0.5  # the acceptance of the first token, before any is seen
RETRY_AFTER = 64  # passes until a longer draft is tried again


@dataclass
class FixedLength:
    """Drafts `longest` tokens, or `longest` levels of a tree."""

    longest: int

    def choose(self) -> int:
        """The length of the next draft."""
        return self.longest

    def record(self, drafted: int, accepted: int) -> None:
        """A draft of `drafted` tokens was verified, and `accepted` of them kept."""

    def record_seconds(self, *, draft: float, verify: float, length: int) -> None:
        """The times of a draft and of its verification, for a pass with at most `length` draft tokens in a row."""


@dataclass
class Mean:
    """total / count, in which each older pass weighs `DECAY` of the next."""

    total: float = 0.0
    count: float = 0.0

    def add(self, total: float, count: int = 1) -> None:
        """Adds `count` values with the sum `total`."""
        self.total, self.count = self.total * DECAY + total, self.count * DECAY + count

    @property
    def value(self) -> float:
        """The mean of all values; 0 without any."""
        return self.total / self.count if self.count else 0.0


@dataclass
class CostLength:
    """Drafts the length from 0 to `longest` that gives the most tokens per second, by what it has measured so far.

    The times are those of this machine, so two runs may draft differently. The text of greedy decoding and of drafts
    without a model is the same; that of other sampled drafts follows the same law.
    """

    longest: int
    _acceptance: defaultdict[int, Mean] = field(default_factory=lambda: defaultdict(Mean))  # by position in the draft
    _draft_seconds: Mean = field(default_factory=Mean)  # of a token
    _verify_seconds: defaultdict[int, Mean] = field(default_factory=lambda: defaultdict(Mean))
    _steps: int = 0

    def choose(self) -> int:
        """The length of the next draft: 0 and the longest one first, and now and then a longer one than the best."""
        if 0 not in self._verify_seconds:
            return 0
        if not self._draft_seconds.count:
            return self.longest
        speeds = self.compute_speeds()
        best = speeds.index(max(speeds))
        self._steps += 1
        return best if self._steps % RETRY_AFTER else min(2 * best + 1, self.longest)

    def record(self, drafted: int, accepted: int) -> None:
        """A draft of `drafted` tokens in a row was verified, and the first `accepted` of them kept."""
        for position in range(min(drafted, accepted + 1)):
            self._acceptance[position].add(float(position < accepted))

    def record_seconds(self, *, draft: float, verify: float, length: int) -> None:
        """The times of a draft and of its verification, for a pass with at most `length` draft tokens in a row."""
        self._verify_seconds[length].add(verify)
        if length:
            self._draft_seconds.add(draft, length)

    def estimate_rates(self, length: int) -> list[float]:
        """a_1 to a_length; each is drawn to the one before it, with the weight of one draft."""
        rates, rate = list[float](), FIRST_RATE
        for position in range(length):
            mean = self._acceptance[position]
            rate = (mean.total + rate) / (mean.count + 1)
            rates.append(rate)
        return rates

    def compute_speeds(self) -> list[float]:
        """Tokens per second with drafts of 0 to `longest` tokens, as predicted."""
        rates, draft = self.estimate_rates(self.longest), self._draft_seconds.value
        lengths = range(self.longest + 1)
        seconds = interpolate({n: mean.value for n, mean in self._verify_seconds.items()}, lengths)
        return [
            divide_by_cost(compute_mean_tokens_by_position(rates[:length]), length, draft, max(verify, 1e-9))
            for length, verify in zip(lengths, seconds, strict=True)
        ]


def interpolate(points: Mapping[int, float], places: Sequence[int]) -> list[float]:
    """The values at some places, on the lines between neighboring points; beyond the points, the nearest one's."""
    keys = sorted(points)
    values: list[float] = np.interp(places, keys, [points[key] for key in keys]).tolist()
    return values
