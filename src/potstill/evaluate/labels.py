"""Where the names of points go on a chart, so that none covers another, a point or the edge.

Greedy over rings of candidate places around each point, the crowded points first, then a few rounds in which each label
may move again. Units are pixels; a box is (left, bottom, right, top).
"""

import math
from collections.abc import Iterator, Sequence

Box = tuple[float, float, float, float]
Spot = tuple[float, float]

RADII = (9, 16, 26, 40, 58, 80, 106, 136)
ANGLES = tuple(math.radians(degrees) for degrees in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160, 70, -70))
ROUNDS = 3


def place(
    anchors: Sequence[Spot], sizes: Sequence[tuple[float, float]], *, inside: Box, obstacles: Sequence[Box] = ()
) -> list[Box]:
    """A box of each of `sizes` (width, height) near its anchor, within `inside`, clear of `obstacles` and of the others.

    Where there is no room for all, overlaps are as small as the search finds.
    """
    boxes: dict[int, Box] = {}
    by_crowd = sorted(range(len(anchors)), key=lambda n: _nearest(anchors, n))
    for _ in range(ROUNDS):
        for n in by_crowd:
            others = [box for m, box in boxes.items() if m != n]
            blocked = [*others, *obstacles]
            candidates = _candidates(anchors[n], sizes[n])
            boxes[n] = min(candidates, key=lambda c: _cost(c[0], c[1], blocked, inside))[0]
    return [boxes[n] for n in range(len(anchors))]


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def nearest_edge(box: Box, spot: Spot) -> Spot:
    """The place on or in `box` that lies nearest to `spot`, where a line from the point to its name ends."""
    return min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1]), box[3])


def _candidates(anchor: Spot, size: tuple[float, float]) -> Iterator[tuple[Box, float]]:
    """(box, distance) for each place, the label's nearest edge on a ring around the anchor."""
    width, height = size
    for radius in RADII:
        for angle in ANGLES:
            x, y = anchor[0] + radius * math.cos(angle), anchor[1] + radius * math.sin(angle)
            left = x - width * (1 - math.cos(angle)) / 2
            bottom = y - height * (1 - math.sin(angle)) / 2
            yield (left, bottom, left + width, bottom + height), radius


def _cost(box: Box, distance: float, blocked: Sequence[Box], inside: Box) -> float:
    covered = sum(overlap(box, other) for other in blocked)
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - overlap(box, inside)
    return distance + 10 * covered + 50 * outside + (1000 if outside > 0 or covered > 0 else 0)


def _nearest(anchors: Sequence[Spot], n: int) -> float:
    return min((math.dist(anchors[n], anchors[m]) for m in range(len(anchors)) if m != n), default=math.inf)
