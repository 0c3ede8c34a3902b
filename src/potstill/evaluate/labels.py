"""Where the names of points go on a chart, so that none covers another, a point or the edge.

Greedy over rings of candidate places around each point, the crowded points first, then a few rounds in which each label
may move again. A name far from its point is joined to it by a line, which is to cross no other name and no other point.
A box is (left, bottom, right, top), in any unit in which a comfortable gap is about 5: points of a printed page, say.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

Box = tuple[float, float, float, float]
Spot = tuple[float, float]

RADII = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 76.0, 94.0)
ANGLES = tuple(math.radians(d) for d in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160, 70, -70, 110, -110))
JOINED = 11.0  # a label further away than this gets a line
ROUNDS = 4


def place(
    anchors: Sequence[Spot],
    sizes: Sequence[tuple[float, float]],
    *,
    inside: Box,
    marks: Sequence[Sequence[Box]] | None = None,
    curves: Sequence[Sequence[Spot]] = (),
) -> list[Box]:
    """A box of each of `sizes` (width, height) near its anchor, within `inside`, clear of all `marks` and other labels.

    `marks[n]` is what point n itself covers; `curves` are drawn through the chart and better not written upon. Where
    there is no room for all, overlaps are as small as the search finds.
    """
    marks = marks or [[] for _ in anchors]
    boxes: dict[int, Box] = {}
    for _ in range(ROUNDS):
        before = dict(boxes)
        for n in sorted(range(len(anchors)), key=lambda m: _nearest(anchors, m)):
            foreign = [box for m, owned in enumerate(marks) if m != n for box in owned]
            names = [box for m, box in boxes.items() if m != n]
            lines = [(anchors[m], nearest_edge(box, anchors[m])) for m, box in boxes.items() if m != n]
            rivals = [spot for m, spot in enumerate(anchors) if m != n]
            scene = _Scene(anchors[n], rivals, [*marks[n], *foreign, *names], [*names, *foreign], lines, curves, inside)
            boxes[n] = scene.best(sizes[n])
        if boxes == before:
            break
    return [boxes[n] for n in range(len(anchors))]


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def nearest_edge(box: Box, spot: Spot) -> Spot:
    """The place on or in `box` that lies nearest to `spot`, where a line from the point to its name ends."""
    return min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1]), box[3])


def crosses(line: tuple[Spot, Spot], box: Box) -> bool:
    """Whether a line runs through the inside of `box` (Liang and Barsky, 1984)."""
    (x, y), (to_x, to_y) = line
    enter, leave = 0.0, 1.0
    for start, step, low, high in ((x, to_x - x, box[0], box[2]), (y, to_y - y, box[1], box[3])):
        if step == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / step, (high - start) / step))
        enter, leave = max(enter, near), min(leave, far)
    return enter < leave


class _Scene(NamedTuple):
    """What stands around one label while a place for it is sought."""

    anchor: Spot
    rivals: Sequence[Spot]  # the other points
    solid: Sequence[Box]  # not to be covered
    untouchable: Sequence[Box]  # not to be crossed by the line to the label
    lines: Sequence[tuple[Spot, Spot]]  # from other points to their labels
    curves: Sequence[Sequence[Spot]]
    inside: Box

    def best(self, size: tuple[float, float]) -> Box:
        """The cheapest place for a label of `size`; rings that cannot be cheaper any more are not looked at."""
        found: tuple[float, Box] = (math.inf, self.inside)
        for box, radius in _candidates(self.anchor, size):
            if radius >= found[0]:
                break
            if (price := self.cost(box, radius)) < found[0]:
                found = price, box
        return found[1]

    def cost(self, box: Box, radius: float) -> float:
        """The radius around the point, and much more for all that is covered, crossed or cut off."""
        end = nearest_edge(box, self.anchor)
        covered = sum(overlap(box, other) for other in self.solid)
        outside = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, self.inside)
        crossed = sum(joined(*line) and crosses(line, box) for line in self.lines)
        if joined(self.anchor, end):
            crossed += sum(crosses((self.anchor, end), other) for other in self.untouchable)
        written_on = sum(any(crosses(part, box) for part in pairwise(curve)) for curve in self.curves)
        nearest = min((math.dist(spot, nearest_edge(box, spot)) for spot in self.rivals), default=math.inf)
        confusing = max(0.0, math.dist(self.anchor, end) - nearest)  # whose name is it, if another point is nearer?
        hit = covered > 0 or outside > 1e-6
        return (
            radius + 4 * confusing + 10 * covered + 50 * outside + 60 * crossed + 25 * written_on + (1000 if hit else 0)
        )


def joined(anchor: Spot, end: Spot) -> bool:
    """Whether a label whose nearest edge is at `end` is so far from its point that a line has to join them."""
    return math.dist(anchor, end) > JOINED


def _candidates(anchor: Spot, size: tuple[float, float]) -> Iterator[tuple[Box, float]]:
    """(box, radius) for boxes that touch a ring around the anchor, to its right first."""
    width, height = size
    for radius in RADII:
        for angle in ANGLES:
            left = anchor[0] + radius * math.cos(angle) - width * (1 - math.cos(angle)) / 2
            bottom = anchor[1] + radius * math.sin(angle) - height * (1 - math.sin(angle)) / 2
            yield (left, bottom, left + width, bottom + height), radius


def _nearest(anchors: Sequence[Spot], n: int) -> float:
    return min((math.dist(anchors[n], anchors[m]) for m in range(len(anchors)) if m != n), default=math.inf)
