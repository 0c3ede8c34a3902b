"""Relations inside documents: a literal number, and what must not matter."""

import pytest
import torch

from potstill.ops.relation import relation_kl, relation_scores

ONE = torch.zeros(2, dtype=torch.long)


def test_it_is_the_number_of_the_literature() -> None:
    teacher, student = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1, 0]])
    rows = relation_scores(teacher, heads=1, causal=False).softmax(-1)[0]
    torch.testing.assert_close(rows, torch.tensor([[0.669762, 0.330238], [0.330238, 0.669762]]), rtol=1e-5, atol=0)
    both = relation_kl(teacher, student, ONE, heads=1, causal=False)
    assert both.item() == pytest.approx(2 * 0.058800, rel=1e-4)
    assert relation_kl(teacher, student, ONE, heads=1).item() == pytest.approx(0.058800, rel=1e-4)  # row 0 sees itself


def some(seed: int, width: int, rows: int = 9) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).double()


DOCUMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 3, 3, 3])


def test_documents_together_give_what_they_give_apart_and_what_one_mask_says() -> None:
    teacher, student = some(1, 12), some(2, 8).requires_grad_()
    whole = relation_kl(teacher, student, DOCUMENTS, heads=4)
    mask = (DOCUMENTS[:, None] != DOCUMENTS) | torch.ones(9, 9, dtype=torch.bool).triu(1)
    phis = (x.unflatten(-1, (4, -1)).transpose(0, 1) for x in (teacher, student))
    log_t, log_s = ((phi @ phi.mT / phi.shape[-1] ** 0.5).masked_fill(mask, -1e9).log_softmax(-1) for phi in phis)
    literal = (log_t.exp() * (log_t - log_s)).sum() / 4
    torch.testing.assert_close(whole, literal)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (whole, literal)))


def test_it_is_zero_where_equal_and_above_where_not() -> None:
    student = some(1, 12).requires_grad_()
    same = relation_kl(student.detach(), student, DOCUMENTS, heads=4)
    assert abs(same.item()) < 1e-12
    assert torch.autograd.grad(same, student)[0].abs().max() < 1e-12
    assert relation_kl(some(2, 12), student, DOCUMENTS, heads=4) > 0.1


def test_turning_a_head_and_reordering_heads_change_nothing() -> None:
    teacher, student = some(1, 12), some(2, 12)
    turn = torch.linalg.qr(some(3, 3, rows=3))[0]
    order = [2, 0, 3, 1]
    whole = relation_kl(teacher, student, DOCUMENTS, heads=4)
    turned = (student.unflatten(-1, (4, 3)) @ turn).flatten(-2)
    torch.testing.assert_close(relation_kl(teacher, turned, DOCUMENTS, heads=4), whole)
    mixed = (x.unflatten(-1, (4, 3))[:, order].flatten(-2) for x in (teacher, student))
    torch.testing.assert_close(relation_kl(*mixed, DOCUMENTS, heads=4), whole)


def test_no_rows_give_zero() -> None:
    assert relation_kl(some(1, 4, rows=0), some(2, 4, rows=0), DOCUMENTS[:0], heads=2).item() == 0
