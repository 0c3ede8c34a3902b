"""Places the labels of points on a chart so that none covers another label, a point or the edge.

The search is greedy over rings of candidate places around each point, crowded points first, with a few rounds in which
each label may move again. A label far from its point gets a leader line, which should cross no other label or point.
A box is (left, bottom, right, top), in a unit in which about 5 is a comfortable gap, such as points of a printed page.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

Box = tuple[float, float, float, float]
Position = tuple[float, float]

RADII = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 76.0, 94.0)
ANGLES = tuple(math.radians(d) for d in (0, 180, 45, -45, 135, -135, 90, -90, 20, -20, 160, -160, 70, -70, 110, -110))
LEADER_LINE_DISTANCE = 11.0  # a label farther away than this gets a leader line
ROUNDS = 4


def place_labels(
    anchors: Sequence[Position],
    sizes: Sequence[tuple[float, float]],
    *,
    bounds: Box,
    marks: Sequence[Sequence[Box]] | None = None,
    curves: Sequence[Sequence[Position]] = (),
) -> list[Box]:
    """A box of each of `sizes` (width, height) near its anchor, inside `bounds`, clear of `marks` and other labels.

    `marks[n]` are the boxes that point n covers. Labels avoid the `curves`, less strictly than marks. Without enough
    room for all labels, the search keeps overlaps small.
    """
    marks = marks or [[] for _ in anchors]
    boxes: dict[int, Box] = {}
    for _ in range(ROUNDS):
        previous_boxes = dict(boxes)
        for n in sorted(range(len(anchors)), key=lambda m: _nearest_distance(anchors, m)):
            other_marks = [box for m, mark_boxes in enumerate(marks) if m != n for box in mark_boxes]
            label_boxes = [box for m, box in boxes.items() if m != n]
            lines = [(anchors[m], nearest_edge(box, anchors[m])) for m, box in boxes.items() if m != n]
            other_points = [position for m, position in enumerate(anchors) if m != n]
            scene = _LabelScene(
                anchors[n],
                other_points,
                [*marks[n], *other_marks, *label_boxes],
                [*label_boxes, *other_marks],
                lines,
                curves,
                bounds,
            )
            boxes[n] = scene.find_best_box(sizes[n])
        if boxes == previous_boxes:
            break
    return [boxes[n] for n in range(len(anchors))]


def overlap(a: Box, b: Box) -> float:
    """The area of the intersection of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def nearest_edge(box: Box, position: Position) -> Position:
    """The place in `box` nearest to `position`, where a leader line ends."""
    return min(max(position[0], box[0]), box[2]), min(max(position[1], box[1]), box[3])


def crosses(line: tuple[Position, Position], box: Box) -> bool:
    """Whether a line crosses the inside of `box` (the clipping of Liang and Barsky, 1984)."""
    (x, y), (to_x, to_y) = line
    t_enter, t_exit = 0.0, 1.0
    for start, step, low, high in ((x, to_x - x, box[0], box[2]), (y, to_y - y, box[1], box[3])):
        if step == 0:
            if not low < start < high:
                return False
            continue
        t_near, t_far = sorted(((low - start) / step, (high - start) / step))
        t_enter, t_exit = max(t_enter, t_near), min(t_exit, t_far)
    return t_enter < t_exit


class _LabelScene(NamedTuple):
    """The surroundings of one label during the search for its place."""

    anchor: Position
    other_points: Sequence[Position]
    obstacles: Sequence[Box]  # that the label must not cover
    line_obstacles: Sequence[Box]  # that the leader line must not cross
    lines: Sequence[tuple[Position, Position]]  # leader lines of the other labels
    curves: Sequence[Sequence[Position]]
    bounds: Box

    def find_best_box(self, size: tuple[float, float]) -> Box:
        """The cheapest place for a label of `size`; the search ends at a ring that costs more than it."""
        best_candidate: tuple[float, Box] = (math.inf, self.bounds)
        for box, radius in _iterate_candidates(self.anchor, size):
            if radius >= best_candidate[0]:
                break
            if (candidate_cost := self.cost(box, radius)) < best_candidate[0]:
                best_candidate = candidate_cost, box
        return best_candidate[1]

    def cost(self, box: Box, radius: float) -> float:
        """The radius around the point, plus large costs for everything covered, crossed or cut off."""
        end = nearest_edge(box, self.anchor)
        covered_area = sum(overlap(box, obstacle) for obstacle in self.obstacles)
        outside_area = (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, self.bounds)
        num_crossings = sum(needs_leader_line(*line) and crosses(line, box) for line in self.lines)
        if needs_leader_line(self.anchor, end):
            num_crossings += sum(crosses((self.anchor, end), obstacle) for obstacle in self.line_obstacles)
        num_curves_hit = sum(any(crosses(segment, box) for segment in pairwise(curve)) for curve in self.curves)
        nearest_distance = min(
            (math.dist(position, nearest_edge(box, position)) for position in self.other_points), default=math.inf
        )
        ambiguity = max(0.0, math.dist(self.anchor, end) - nearest_distance)  # another point is nearer to the label
        is_blocked = covered_area > 0 or outside_area > 1e-6
        return (
            radius
            + 4 * ambiguity
            + 10 * covered_area
            + 50 * outside_area
            + 60 * num_crossings
            + 25 * num_curves_hit
            + (1000 if is_blocked else 0)
        )


def needs_leader_line(anchor: Position, end: Position) -> bool:
    """Whether a label whose nearest edge is at `end` is so far from its point that it needs a leader line."""
    return math.dist(anchor, end) > LEADER_LINE_DISTANCE


def _iterate_candidates(anchor: Position, size: tuple[float, float]) -> Iterator[tuple[Box, float]]:
    """(box, radius) of boxes that touch rings around the anchor, beginning on its right."""
    width, height = size
    for radius in RADII:
        for angle in ANGLES:
            left = anchor[0] + radius * math.cos(angle) - width * (1 - math.cos(angle)) / 2
            bottom = anchor[1] + radius * math.sin(angle) - height * (1 - math.sin(angle)) / 2
            yield (left, bottom, left + width, bottom + height), radius


def _nearest_distance(anchors: Sequence[Position], index: int) -> float:
    return min(
        (
            math.dist(anchors[index], anchors[other_index])
            for other_index in range(len(anchors))
            if other_index != index
        ),
        default=math.inf,
    )
