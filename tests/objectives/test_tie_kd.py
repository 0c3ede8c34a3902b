"""TIE-KD's objective: its two terms are those of the equations, and reach the student alone."""

import pytest
import torch
from tests.objectives.test_dual_space import BATCH, IDS, STUDENT, TARGETS, TEACHER, network

from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.tie_kd import TieKD
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.divergence import DIVERGENCES
from potstill.ops.fused import sum_row_losses_densely
from potstill.ops.ranking import hierarchical_ranking_loss


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_terms_are_those_of_the_equations(divergence: str, tau: float) -> None:
    student, teacher = network(5, STUDENT, IDS, 1, trained=True), network(5, TEACHER, IDS, 2)
    objective = TieKD(k=3, divergence=DIVERGENCES[divergence], temperature=tau)
    found = objective({"student": student}, {"teacher": teacher}, BATCH)
    z, t = (one.logits(one.rows) / tau for one in (student, teacher))
    ranking = tau * hierarchical_ranking_loss(t.softmax(-1), z.softmax(-1), k=3).sum()
    torch.testing.assert_close(found["tie_kd_ranking"], ranking)
    torch.testing.assert_close(found["tie_kd_divergence"], tau**2 * DIVERGENCES[divergence](t, z).sum())
    assert objective.counts(BATCH) == {"tie_kd_divergence": 5, "tie_kd_ranking": 5}


def test_fused_is_plain_in_every_gradient_beside_cross_entropy() -> None:
    student, teacher = network(5, STUDENT, IDS, 1, trained=True), network(5, TEACHER, IDS, 2, trained=True)
    assert student.head is not None
    objective = TieKD(k=2)
    whole = WeightedSum((0.5, CrossEntropy()), (0.5, objective))
    found = whole({"student": student}, {"teacher": teacher}, BATCH)
    terms = objective.split({"student": student}, {"teacher": teacher}, BATCH)[0]
    said = {"teacher": lambda a, b: teacher.logits(teacher.rows[a:b])}
    expected = sum_row_losses_densely(
        [term.loss for term in terms.values()], student.rows, student.head, targets=TARGETS, frozen=said
    )
    loss = found["tie_kd_divergence"] + found["tie_kd_ranking"]
    of = (student.rows, student.head.weight)
    both = (torch.autograd.grad(x, of, retain_graph=True) for x in (loss, sum(expected, torch.tensor(0.0))))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)
    loss.backward()
    assert teacher.rows.grad is None
