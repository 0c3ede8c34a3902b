"""Attention across two readings of the same documents, and the projection that keeps what a head says."""

import math

import pytest
import torch
from torch import Tensor

from potstill.ops.cross_attention import cross_attention
from potstill.ops.projection import fit_projection, inverse_gram


def sides(seed: int = 0) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Documents 0, 2, 3 on one side and 0, 1, 3 on the other."""
    torch.manual_seed(seed)
    ours, theirs = torch.tensor([0, 0, 0, 2, 3, 3]), torch.tensor([0, 0, 1, 1, 3, 3, 3])
    queries, keys = torch.randn(6, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    return queries, keys, (torch.randn(6, 3).double(), ours), (torch.randn(7, 5).double(), theirs)


def definition(queries: Tensor, keys: Tensor, ours: tuple, theirs: tuple) -> tuple[Tensor, Tensor]:
    apart = ours[1][:, None] != theirs[1][None]
    scores = (queries @ keys.mT / math.sqrt(queries.shape[1])).masked_fill(apart, -math.inf)
    forth, back = scores.softmax(1).nan_to_num(), scores.softmax(0).nan_to_num()
    return forth @ theirs[0], back.mT @ ours[0]


def test_each_document_attends_to_itself_alone_as_one_masked_matrix_says() -> None:
    torch.testing.assert_close(cross_attention(*sides()), definition(*sides()))


def test_rows_without_a_counterpart_get_zero() -> None:
    forth, back = cross_attention(*sides())
    assert not forth[3].any()
    assert not back[2:4].any()


def test_the_order_of_the_other_side_does_not_matter() -> None:
    queries, keys, ours, (states, documents) = sides()
    order = torch.tensor([1, 0, 3, 2, 6, 4, 5])
    forth, back = cross_attention(queries, keys, ours, (states, documents))
    again, moved = cross_attention(queries, keys[order], ours, (states[order], documents[order]))
    torch.testing.assert_close(again, forth)
    torch.testing.assert_close(moved, back[order])


def test_autocast_does_not_halve_it() -> None:
    queries, keys, ours, theirs = (x.float() if isinstance(x, Tensor) else (x[0].float(), x[1]) for x in sides())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forth, _ = cross_attention(queries, keys, ours, theirs)
    assert torch.equal(forth, cross_attention(queries, keys, ours, theirs)[0])


def test_golden_numbers_of_both_projectors() -> None:
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.eye(3)
    expected = torch.tensor([[2.0, -1.0], [-1.0, 2.0], [1.0, 1.0]]) / 3
    torch.testing.assert_close(fit_projection(teacher, student), expected)
    torch.testing.assert_close(fit_projection(student, teacher), student.mT)
    torch.testing.assert_close(torch.tensor([1.0, 2.0, 0.0]) @ expected @ student.mT, torch.tensor([0.0, 1.0, 1.0]))


def test_projected_logits_are_the_nearest_that_the_head_can_give() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(40, 9).double(), torch.randn(40, 5).double()
    states = torch.randn(7, 9).double()
    wanted = states @ teacher.mT
    nearest = torch.linalg.lstsq(student, wanted.mT).solution
    torch.testing.assert_close(states @ fit_projection(teacher, student), nearest.mT)


def test_equal_heads_need_no_projection() -> None:
    torch.manual_seed(0)
    head = torch.randn(30, 6).double()
    torch.testing.assert_close(fit_projection(head, head), torch.eye(6).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_is_float32_at_least_whatever_autocast_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(300, 9).to(dtype), torch.randn(300, 5).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fit_projection(teacher, student, inverse_gram(student))
    assert found.dtype == torch.float32
    exact = fit_projection(teacher.double(), student.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
