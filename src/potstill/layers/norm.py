"""Normalisation by the root of the mean square, without centring (arXiv:1910.07467, Eq. 4)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps).

    The mean square is taken in float32 whatever the dtype of `x`, float64 included, and the result is rounded to that
    dtype before it meets the weight: exactly what Llama and Qwen do in Hugging Face, so that logits agree to the bit.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The normalised `x`, in its dtype."""
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon, for printing."""
        return f"{len(self.weight)}, eps={self.eps}"
