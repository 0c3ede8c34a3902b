"""Attention between the rows of two models with different tokens for the same documents."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cross_attention(
    queries: Float[Tensor, "N K"],
    keys: Float[Tensor, "M K"],
    student: tuple[Float[Tensor, "N F"], Int[Tensor, " N"]],
    teacher: tuple[Float[Tensor, "M D"], Int[Tensor, " M"]],
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "M F"]]:
    """(softmax_m(A) teacher, softmax_n(A^T) student), A = queries keys^T / sqrt(K), by document, without a mask inside.

    `student` and `teacher` are values with the document number of each row, ascending. A row gets 0 if its document has
    no row on the other side. All products are in float32 at least, also under autocast.

    Source: Zhang et al., arXiv:2406.17328, section 3.2 (cross-model attention).
    """
    with torch.autocast(queries.device.type, enabled=False):
        return _cross_attention(queries, keys, student, teacher)


def _cross_attention(
    queries: Tensor, keys: Tensor, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    document_numbers = torch.cat([student[1], teacher[1]]).unique()
    student_sizes, teacher_sizes = (
        (document_numbers[:, None] == documents).sum(1).tolist() for documents in (student[1], teacher[1])
    )
    splits = (
        x.to(dtype).split(sizes)
        for x, sizes in (
            (queries, student_sizes),
            (keys, teacher_sizes),
            (student[0], student_sizes),
            (teacher[0], teacher_sizes),
        )
    )
    to_student, to_teacher = (
        [teacher[0].new_zeros(0, teacher[0].shape[1])],
        [student[0].new_zeros(0, student[0].shape[1])],
    )
    for q, k, student_values, teacher_values in zip(*splits, strict=True):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        to_student.append((scores.softmax(1) @ teacher_values).to(teacher[0].dtype))  # the sum over no rows is 0
        to_teacher.append((scores.softmax(0).mT @ student_values).to(student[0].dtype))
    return torch.cat(to_student), torch.cat(to_teacher)
