"""Normalization by the root of the mean square, without centering (arXiv:1910.07467, Eq. 4)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), or with `zero_centered` (1 + weight) instead of the weight.

    It computes the mean square in float32 for any dtype of `x`, float64 included. It rounds the result to the dtype of
    `x` before it multiplies by the weight. Hugging Face's Llama and Qwen do the same, so logits agree to the bit. With
    `zero_centered` it rounds afterwards, as in Gemma.
    """

    def __init__(self, size: int, *, eps: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.zero_centered = eps, zero_centered
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the weight of a fresh norm, which multiplies by 1."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The normalized `x`, in its dtype."""
        x_float = x.to(torch.float32)
        y = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (y * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * y.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and epsilon, for printing."""
        return f"{len(self.weight)}, eps={self.eps}"
