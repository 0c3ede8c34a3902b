"""The hierarchical ranking loss: a literal number, and its laws."""

import pytest
import torch

from potstill.ops.ranking import RankingRows, hierarchical_ranking_loss

TEACHER, STUDENT = torch.tensor([[2.0, 1, 0, -1]]), torch.tensor([[0.0, 1, 0.5, -2]])


def test_it_is_the_number_of_the_literature() -> None:
    p, q = TEACHER.softmax(-1), STUDENT.softmax(-1)
    torch.testing.assert_close(
        hierarchical_ranking_loss(p, q, k=2), torch.tensor([0.312282 + 0.430181]), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(hierarchical_ranking_loss(p, q, k=1), torch.tensor([0.312282]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [1, 3, 5, 100])
def test_it_is_the_definition_pair_by_pair(k: int) -> None:
    torch.manual_seed(0)
    p, q = torch.randn(6, 12).double().softmax(-1), torch.randn(6, 12).double().softmax(-1)
    for row, value in zip(range(6), hierarchical_ranking_loss(p, q, k=k), strict=True):
        ours, theirs = (x[row].argsort(descending=True)[:k].tolist() for x in (p, q))
        expected = sum(max(0.0, q[row, i].item() - q[row, ours[0]].item()) for i in ours)
        for i in ours:
            expected += sum(max(0.0, (q[row, j] - q[row, i]).item()) for j in theirs if p[row, i] > p[row, j])
        assert value.item() == pytest.approx(expected)


def test_a_student_with_the_teachers_order_has_no_loss_and_no_gradient() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(5, 30)
    for student in (teacher.clone(), 0.3 * teacher + 2, teacher.exp()):
        value = RankingRows()(student.requires_grad_(), {"teacher": teacher}, torch.zeros(5, dtype=torch.long))
        assert not value.any()
        assert not torch.autograd.grad(value.sum(), student)[0].any()


def test_both_sides_of_a_margin_are_moved() -> None:
    q = torch.tensor([[0.1, 0.6, 0.3]], requires_grad=True)
    (gradient,) = torch.autograd.grad(hierarchical_ranking_loss(torch.tensor([[0.6, 0.3, 0.1]]), q, k=1).sum(), q)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0]]


def test_the_teachers_own_probabilities_say_which_pairs_are_wrong() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.5, 0.2, 0.3]])
    assert hierarchical_ranking_loss(p, q, k=3).item() == pytest.approx(0.1)


def test_renaming_tokens_and_shifting_logits_change_nothing() -> None:
    torch.manual_seed(0)
    p, logits, order = torch.randn(4, 20).softmax(-1), torch.randn(4, 20), torch.randperm(20)
    value = hierarchical_ranking_loss(p, logits.softmax(-1), k=5)
    torch.testing.assert_close(hierarchical_ranking_loss(p[:, order], logits[:, order].softmax(-1), k=5), value)
    torch.testing.assert_close(hierarchical_ranking_loss(p, (logits + 7).softmax(-1), k=5), value)
