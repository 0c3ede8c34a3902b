"""The derivative of a weighted sum of row losses by the logits.

    sum_k mix[k] loss_k        mix: the weights of the losses, up to a common factor

Source: the definition of each loss in `ops.row_loss`. Losses that share a softmax cost one product with it
(`ops.softmax`), and autograd differentiates those that do not differentiate themselves.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.ops.row_loss import Differentiable, RowInput, RowLoss
from potstill.ops.softmax import Softmax, combine_slopes, get_slope


def differentiate_losses(
    losses: Sequence[RowLoss], student: Tensor, frozen: Mapping[str, RowInput], targets: Tensor, mix: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    """The values of each loss, and the derivative of sum_k mix[k] loss_k by the logits."""
    softmax, slopes = Softmax(student), []
    values: dict[int, Tensor] = {}
    delta = None
    for k, (loss, weight) in enumerate(zip(losses, mix, strict=True)):
        has_values_alone = weight == 0 and isinstance(loss, Differentiable)  # which cost less than its slope
        if not has_values_alone and (slope := get_slope(loss, softmax, frozen, targets)) is not None:
            values[k] = slope.values
            if weight:
                slopes.append((weight, slope))
        elif weight == 0:
            values[k] = loss(student, frozen, targets)
        else:
            differentiate = (
                loss.values_and_gradient
                if isinstance(loss, Differentiable)
                else partial(_differentiate_by_autograd, loss)
            )
            values[k], gradient = differentiate(student, frozen, targets)
            delta = gradient.mul_(weight) if delta is None else delta.add_(gradient, alpha=weight)
    if slopes:
        softmax_delta = combine_slopes(softmax, slopes)
        delta = softmax_delta if delta is None else delta.add_(softmax_delta)
    return [values[k] for k in range(len(losses))], torch.zeros_like(student) if delta is None else delta


def _differentiate_by_autograd(
    loss: RowLoss, student: Tensor, frozen: Mapping[str, RowInput], targets: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        student = student.detach().requires_grad_()
        values = loss(student, frozen, targets)
        (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def normalize_mix(mix: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """(mix / unit, unit) with largest weight 1, so that derivatives divided by a large count survive half precision."""
    unit = max(map(abs, mix), default=0.0) or 1.0
    return tuple(weight / unit for weight in mix), unit


def find_common_factor(upstream: Float[Tensor, " K"], mix: Sequence[float]) -> Tensor | None:
    """c if upstream = c mix up to rounding, else None."""
    expected = upstream.new_tensor(mix)
    largest = expected.abs().argmax()
    factor = upstream[largest] / expected[largest]
    expected = factor * expected
    tolerance = 16 * torch.finfo(upstream.dtype).eps
    return factor if bool(((upstream - expected).abs() <= tolerance * expected.abs()).all()) else None
