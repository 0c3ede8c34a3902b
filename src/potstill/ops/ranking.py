"""The hierarchical ranking loss: the order of the k likeliest tokens of teacher and student.

    R_top1  = sum over i in T of max(0, q[i] - q[t])                       t = the teacher's likeliest token
    R_other = sum over i in T, j in S with p[i] > p[j] of max(0, q[j] - q[i])

T and S are the k likeliest tokens of the teacher and of the student. The hinges are on probabilities: they lower the
token that ranks too high and raise the one that ranks too low. Both are 0 for every student with the teacher's order.

Source: Zhang et al., "Towards Understanding and Improving Knowledge Distillation for Neural Machine Translation"
(arXiv:2305.08096), equations of the hierarchical ranking loss, as in the authors' code (NMT-KD). The same authors'
KDFlow uses the student's own probabilities in the indicator; then every pair counts as right.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from potstill.ops.coarse import CoarseDistribution


def hierarchical_ranking_loss(p: Float[Tensor, "N V"], q: Float[Tensor, "N V"], *, k: int) -> Float[Tensor, " N"]:
    """R_top1 + R_other from probabilities; differentiable by q."""
    teacher_p, teacher_top = p.topk(min(k, p.shape[-1]), -1)
    student_top = q.topk(min(k, q.shape[-1]), -1).indices
    q_teacher_top, q_student_top = q.gather(-1, teacher_top), q.gather(-1, student_top)
    top1_loss = (q_teacher_top - q_teacher_top[:, :1]).clamp(min=0).sum(-1)
    is_ordered = teacher_p[:, :, None] > p.gather(-1, student_top)[:, None]
    other_loss = (q_student_top[:, None] - q_teacher_top[:, :, None]).clamp(min=0) * is_ordered
    return top1_loss + other_loss.sum((-1, -2))


@dataclass(frozen=True)
class RankingRows:
    """tau (R_top1 + R_other) between softmax(teacher / tau) and softmax(student / tau).

    tau and not tau^2: hinges are of first order in the difference of the logits, so their gradient falls as 1 / tau.
    """

    k: int = 5
    temperature: float = 1.0
    teacher: str = "teacher"

    def __call__(
        self,
        student: Float[Tensor, "C V"],
        frozen: Mapping[str, Tensor | CoarseDistribution],
        targets: Int[Tensor, " C"],
    ) -> Float[Tensor, " C"]:
        teacher, tau = frozen[self.teacher], self.temperature
        assert isinstance(teacher, Tensor), "ranking needs the probability of every token"
        return tau * hierarchical_ranking_loss((teacher / tau).softmax(-1), torch.softmax(student / tau, -1), k=self.k)
