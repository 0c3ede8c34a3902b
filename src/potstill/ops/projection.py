"""Maps between the hidden states of two networks that keep what their heads say."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def onto_rows(
    given: Float[Tensor, "S D"], head: Float[Tensor, "S F"], gram: Float[Tensor, "F F"] | None = None
) -> Float[Tensor, "D F"]:
    """P = given^T pinv(head^T), so that for a state h the logits (h P) head^T are the nearest to h given^T.

    pinv(head^T) = head (head^T head)^+, so that no more than [F F] is inverted; `gram` is that inverse where it is
    known already. Computed in float32 at least, also under autocast, since small errors grow by the inverse.

    Source: Zhang et al., arXiv:2504.11426 (initialisation of projectors).
    """
    with torch.autocast(given.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(given.dtype, head.dtype), torch.float32)
        given, head = given.to(wide), head.to(wide)
        gram = inverse_gram(head) if gram is None else gram
        return ((given.mT @ head).double() @ gram.double()).to(wide)


@torch.no_grad()
def inverse_gram(head: Float[Tensor, "S F"]) -> Float[Tensor, "F F"]:
    """(head^T head)^+ in float64."""
    with torch.autocast(head.device.type, enabled=False):
        wide = head.to(torch.promote_types(head.dtype, torch.float32))
        return torch.linalg.pinv((wide.mT @ wide).double(), hermitian=True)
