"""Chooses the size of an elastic model by the load, from the measured seconds of a step of each size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from potstill.decode.draft_length import interpolate


@dataclass
class SizeSchedule:
    """The largest size whose step takes at most `budget` seconds; else the smallest (arXiv:2311.07204's schedule).

    `seconds[s]` holds the seconds of a step of size s, the largest first, by the number of texts. Between two numbers
    they are on a line. More texts than measured wait, so the seconds grow in proportion. A size above the present one
    is chosen only if `margin` of the budget stays free, so that a load near a limit does not switch back and forth.

    The paper publishes the idea alone; the rule and its margin are ours.
    """

    seconds: Sequence[Mapping[int, float]]
    budget: float
    margin: float = 0.2
    size: int = 0  # the present one

    def estimate(self, size: int, load: int) -> float:
        """Seconds between two tokens of a text, if `load` texts are to be written by `size`."""
        points = self.seconds[size]
        most = max(points)
        return interpolate(points, [load])[0] if load <= most else points[most] * load / most

    def choose(self, load: int) -> int:
        """The size for the next texts, of `load` in all."""
        for size in range(len(self.seconds)):
            limit = self.budget if size >= self.size else self.budget * (1 - self.margin)
            if self.estimate(size, load) <= limit or size == len(self.seconds) - 1:
                self.size = size
                break
        return self.size
