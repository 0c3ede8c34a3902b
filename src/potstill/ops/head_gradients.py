"""Accumulators of the gradients of a head and its rows, over chunks of rows.

Source: the definition, by the chain rule: d loss / d W = delta^T rows and d loss / d rows = delta W, where delta is the
derivative by the logits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.ops.precision import get_wide_dtype

TOKEN_BLOCK = 2**10  # rows of the head whose gradient is added at once on a CPU


class HeadGradients(NamedTuple):
    """Gradient accumulators; None if a gradient is not needed. The head's are float32 at least.

    The weight's is uninitialized until the first chunk writes it: zeros of that size cost as much as a product.
    """

    rows: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(self, start: int, delta: Float[Tensor, "C V"], rows: Float[Tensor, "C F"], weight: Tensor) -> None:
        """Add the gradients from `delta`, the derivative by the logits of `rows`, which begin at index `start`."""
        if self.rows is not None:
            torch.mm(delta, weight, out=self.rows[start : start + len(rows)])
        if self.weight is not None and self.weight.dtype == rows.dtype:
            self.weight.addmm_(delta.mT, rows, beta=int(start > 0))
        elif self.weight is not None:
            for block in _split_tokens(delta):
                product = delta[:, block].mT @ rows
                self.weight[block].add_(product) if start else self.weight[block].copy_(product)
        if self.bias is not None:
            self.bias.add_(delta.sum(0, dtype=self.bias.dtype))


def make_accumulators(
    rows: Tensor, weight: Tensor, bias: Tensor | None, needs_gradient: Sequence[bool]
) -> HeadGradients:
    """Accumulators of the gradients by rows, weight and bias that are needed."""
    wide = get_wide_dtype(rows.dtype)
    return HeadGradients(
        rows=torch.zeros_like(rows) if needs_gradient[0] else None,
        weight=(torch.empty_like if len(rows) else torch.zeros_like)(weight, dtype=wide) if needs_gradient[1] else None,
        bias=torch.zeros_like(bias, dtype=wide) if bias is not None and needs_gradient[2] else None,
    )


def _split_tokens(delta: Float[Tensor, "C V"]) -> Iterator[slice]:
    """Blocks of tokens on a CPU, where adding bf16 to float32 first makes a float32 copy; all tokens elsewhere."""
    size = TOKEN_BLOCK if delta.device.type == "cpu" else delta.shape[1]
    return (slice(start, start + size) for start in range(0, delta.shape[1], size))
