"""Relations between the rows of one document, which do not depend on the width of the model.

    R = softmax(phi phi^T / sqrt(K) + mask)      phi [T A K]: A relation heads; the width K depends on the model
    loss = 1/A sum over heads and rows of KL(R_teacher || R_student)

Source: Wang et al., MiniLMv2 (arXiv:2012.15828), section 3.1. Departs from it: with `causal` a row relates only to
itself and earlier rows, as in a causal model; the paper's encoders attend both ways. There is no 1e-7 inside the
logarithms.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from potstill.ops.divergence import forward_kl
from potstill.ops.precision import upcast


def relation_kl(
    teacher: Float[Tensor, "N W"],
    student: Float[Tensor, "N D"],
    documents: Int[Tensor, " N"],
    *,
    heads: int,
    causal: bool = True,
) -> Float[Tensor, ""]:
    """The loss summed over rows, document by document; differentiable by the student.

    It computes no relations between documents. Only the [A T T] of one document is in memory; the backward computes it
    again.
    """
    sizes = torch.unique_consecutive(documents, return_counts=True)[1].tolist()
    total = student[:0].sum(
        dtype=torch.promote_types(student.dtype, torch.float32)
    )  # has a gradient even without documents
    with torch.autocast(student.device.type, enabled=False):
        for teacher_rows, student_rows in zip(teacher.split(sizes), student.split(sizes), strict=True):
            arguments = teacher_rows, student_rows, heads, causal
            total = total + checkpoint(_document_kl, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total


def relation_scores(phi: Float[Tensor, "T W"], *, heads: int, causal: bool) -> Float[Tensor, "A T T"]:
    """phi phi^T / sqrt(K), with -inf at later rows if `causal`."""
    head_rows = upcast(phi).unflatten(-1, (heads, -1)).transpose(0, 1)
    scores = head_rows @ head_rows.mT / math.sqrt(head_rows.shape[-1])
    if not causal:
        return scores
    is_future = torch.ones(len(phi), len(phi), dtype=torch.bool, device=phi.device).triu(1)
    return scores.masked_fill(is_future, -torch.inf)


def _document_kl(teacher: Tensor, student: Tensor, heads: int, causal: bool) -> Tensor:
    teacher_scores, student_scores = (
        relation_scores(phi, heads=heads, causal=causal).flatten(0, 1) for phi in (teacher, student)
    )
    return forward_kl(teacher_scores, student_scores).sum() / heads
