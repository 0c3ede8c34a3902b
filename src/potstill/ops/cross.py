"""Attention between the rows of two networks that read the same documents as different tokens."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def crossed(
    queries: Float[Tensor, "N K"],
    keys: Float[Tensor, "M K"],
    ours: tuple[Float[Tensor, "N F"], Int[Tensor, " N"]],
    theirs: tuple[Float[Tensor, "M D"], Int[Tensor, " M"]],
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "M F"]]:
    """(softmax_m(A) theirs, softmax_n(A^T) ours), A = queries keys^T / sqrt(K), document by document, no mask inside.

    `ours` and `theirs` are what is mixed, with the document of each row, ascending. A row whose document has no row on
    the other side gets 0. All of it is float32 at least, also under autocast.

    Source: Zhang et al., arXiv:2406.17328, section 3.2 (cross-model attention).
    """
    with torch.autocast(queries.device.type, enabled=False):
        return _crossed(queries, keys, ours, theirs)


def _crossed(
    queries: Tensor, keys: Tensor, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    numbers = torch.cat([ours[1], theirs[1]]).unique()
    mine, yours = ((numbers[:, None] == documents).sum(1).tolist() for documents in (ours[1], theirs[1]))
    cut = (
        x.to(wide).split(sizes) for x, sizes in ((queries, mine), (keys, yours), (ours[0], mine), (theirs[0], yours))
    )
    forth, back = [theirs[0].new_zeros(0, theirs[0].shape[1])], [ours[0].new_zeros(0, ours[0].shape[1])]
    for q, k, own, other in zip(*cut, strict=True):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        forth.append((scores.softmax(1) @ other).to(theirs[0].dtype))  # over no rows the sum is 0
        back.append((scores.softmax(0).mT @ own).to(ours[0].dtype))
    return torch.cat(forth), torch.cat(back)
