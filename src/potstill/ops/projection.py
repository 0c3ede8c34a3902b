"""Maps between the hidden states of two networks that keep what their heads say."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def fit_projection(
    source_head: Float[Tensor, "S D"], target_head: Float[Tensor, "S F"], gram: Float[Tensor, "F F"] | None = None
) -> Float[Tensor, "D F"]:
    """P = given^T pinv(head^T), so that for a state h the logits (h P) head^T are the nearest to h given^T.

    pinv(head^T) = head (head^T head)^+, so that no more than [F F] is inverted; `gram` is that inverse where it is
    known already. Computed in float32 at least, also under autocast, since small errors grow by the inverse.

    Source: Zhang et al., arXiv:2504.11426 (initialisation of projectors).
    """
    with torch.autocast(source_head.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(source_head.dtype, target_head.dtype), torch.float32)
        source_head, target_head = source_head.to(dtype), target_head.to(dtype)
        gram = inverse_gram(target_head) if gram is None else gram
        return ((source_head.mT @ target_head).double() @ gram.double()).to(dtype)


@torch.no_grad()
def inverse_gram(head: Float[Tensor, "S F"]) -> Float[Tensor, "F F"]:
    """(head^T head)^+ in float64."""
    with torch.autocast(head.device.type, enabled=False):
        head_float = head.to(torch.promote_types(head.dtype, torch.float32))
        return torch.linalg.pinv((head_float.mT @ head_float).double(), hermitian=True)
