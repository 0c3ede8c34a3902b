import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.evaluate.charts.label_placement import crosses, nearest_edge, needs_leader_line, overlap, place_labels

FRAME = (0.0, 0.0, 400.0, 300.0)
SPOTS = st.lists(st.tuples(st.floats(10, 390), st.floats(10, 290)), min_size=1, max_size=6)


@settings(max_examples=8)
@given(SPOTS)
def test_labels_never_overlap_nor_leave_the_frame_where_there_is_room(spots):
    marks = [[(x - 4, y - 4, x + 4, y + 4)] for x, y in spots]
    boxes = place_labels(spots, [(70.0, 11.0)] * len(spots), bounds=FRAME, marks=marks)
    for box in boxes:
        assert overlap(box, FRAME) == pytest.approx(70 * 11)
        assert all(overlap(box, mark) == 0 for owned in marks for mark in owned)
    assert all(overlap(a, b) == 0 for a, b in combinations(boxes, 2))


def test_a_lone_label_stays_by_its_point():
    ((left, bottom, right, top),) = place_labels([(200.0, 150.0)], [(70.0, 11.0)], bounds=FRAME)
    assert math.dist(nearest_edge((left, bottom, right, top), (200.0, 150.0)), (200.0, 150.0)) < 8


def test_points_in_one_place_get_labels_apart():
    boxes = place_labels([(200.0, 150.0)] * 6, [(90.0, 12.0)] * 6, bounds=FRAME)
    assert all(overlap(a, b) == 0 for a, b in combinations(boxes, 2))


def test_a_label_lies_nearer_to_its_own_point_than_to_another():
    spots = [(205.0, 140.0), (199.0, 157.0), (207.0, 147.0)]
    marks = [[(x - 4, y - 4, x + 4, y + 4)] for x, y in spots]
    for own, box in zip(spots, place_labels(spots, [(60.0, 12.0)] * 3, bounds=FRAME, marks=marks), strict=True):
        distances = {spot: math.dist(spot, nearest_edge(box, spot)) for spot in spots}
        assert distances[own] == min(distances.values())


def test_not_even_a_sliver_of_a_mark_is_covered():
    (box,) = place_labels([(200.0, 150.0)], [(70.0, 11.0)], bounds=FRAME, marks=[[(193.99, 120.0, 206.01, 180.0)]])
    assert overlap(box, (193.99, 120.0, 206.01, 180.0)) == 0


def test_where_there_is_no_room_labels_overlap_as_little_as_can_be():
    a, b = place_labels([(60.0, 10.0), (62.0, 10.0)], [(70.0, 11.0)] * 2, bounds=(0.0, 0.0, 134.0, 21.0))
    assert 0 < overlap(a, b) <= 0.3 * 70 * 11


def test_a_label_is_not_written_on_a_curve():
    curve = [(0.0, 150.0), (400.0, 150.0)]
    (free,) = place_labels([(200.0, 150.0)], [(70.0, 11.0)], bounds=FRAME)
    (moved,) = place_labels([(200.0, 150.0)], [(70.0, 11.0)], bounds=FRAME, curves=[curve])
    assert crosses((curve[0], curve[1]), free)
    assert not crosses((curve[0], curve[1]), moved)


def test_a_line_to_a_label_crosses_no_other_label():
    spots = [(200.0, 150.0 + 3 * n) for n in range(7)]
    boxes = place_labels(spots, [(60.0, 12.0)] * 7, bounds=FRAME)
    assert any(needs_leader_line(spot, nearest_edge(box, spot)) for spot, box in zip(spots, boxes, strict=True))
    for n, (spot, box) in enumerate(zip(spots, boxes, strict=True)):
        end = nearest_edge(box, spot)
        others = [other for m, other in enumerate(boxes) if m != n]
        assert not needs_leader_line(spot, end) or not any(crosses((spot, end), other) for other in others)


@pytest.mark.parametrize(
    ("line", "hit"),
    [
        (((0, 5), (20, 5)), True),
        (((0, 0), (20, 20)), True),
        (((12, 12), (13, 13)), True),
        (((0, 30), (20, 30)), False),
        (((0, 5), (4, 5)), False),
        (((0, 12), (12, 30)), False),
        (((5, 0), (5, 30)), False),
        (((12, 0), (12, 30)), True),
    ],
)
def test_a_line_crosses_a_box_or_not(line, hit):
    (x, y), (to_x, to_y) = line
    assert crosses(((float(x), float(y)), (float(to_x), float(to_y))), (10.0, 4.0, 15.0, 14.0)) == hit
