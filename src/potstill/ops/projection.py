"""Maps between the hidden states of two models that keep the logits of their heads."""

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.ops.precision import upcast


@torch.no_grad()
def fit_projection(
    source_head: Float[Tensor, "S D"], target_head: Float[Tensor, "S F"], gram: Float[Tensor, "F F"] | None = None
) -> Float[Tensor, "D F"]:
    """P = source_head^T pinv(target_head^T): (h P) target_head^T is nearest to the logits h source_head^T.

    pinv(head^T) = head (head^T head)^+, so it inverts only an [F F] matrix; `gram` is this inverse if it is known. It
    computes in float32 at least, also under autocast, because the inverse amplifies small errors.

    Source: Zhang et al., arXiv:2504.11426 (initialization of projectors).
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
        head_float = upcast(head)
        return torch.linalg.pinv((head_float.mT @ head_float).double(), hermitian=True)
