"""A causal convolution over the last W tokens, each channel by itself, and SiLU: the definition in recurrent mixers.

    y_t = silu(sum_{j < W} w_{W-1-j} x_{t-j})        inputs before the document are 0

It stands before the queries, keys and values of DeltaNet (arXiv:2406.06484, Section 3.4). `short_convolution_loop` is
this definition, token by token. `short_convolution` is the same function. It sums one shifted input after another in
place, span by span. The backward pass computes the sums again, so only inputs are stored. The state is the tail, the
last W - 1 inputs of the current document. Sums are float32, or float64 for values in float64.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad, silu

from potstill.ops.precision import upcast

SPAN = 256  # tokens at a time: few enough for a CPU's cache


def short_convolution_loop(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    tail: Float[Tensor, "B W-1 D"] | None = None,
    *,
    starts: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B W-1 D"]]:
    """(outputs, tail after them), token by token: the definition.

    `starts` is True at the first token of each document, which sees nothing earlier, `tail` included.
    """
    window = torch.cat([torch.zeros_like(x[:, :1]), _make_tail(x, weight) if tail is None else tail], 1)
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat([window[:, 1:], x[:, t : t + 1]], 1)
        if starts is not None:
            window = torch.cat([window[:, :-1] * ~starts[:, t, None, None], window[:, -1:]], 1)
        outputs.append(silu((upcast(window) * upcast(weight).mT).sum(1)).to(x.dtype))
    return torch.stack(outputs, 1), window[:, 1:]


def short_convolution(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    tail: Float[Tensor, "B W-1 D"] | None = None,
    *,
    starts: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B W-1 D"]]:
    """What `short_convolution_loop` gives, in value and in every gradient."""
    width, length = weight.shape[1], x.shape[1]
    has_tail = tail is not None
    tail = _make_tail(x, weight) if tail is None else tail
    masks: list[Tensor] = []
    last = torch.cat([tail, x], 1)[:, length:] if length < width - 1 else x[:, length - width + 1 :].clone()
    if starts is not None and bool(starts[:, 0 if has_tail else 1 :].any()):  # else no sum crosses a start
        document = pad(starts.cumsum(1), (width - 1, 0))
        is_visible = document.unfold(1, width, 1) == document[:, width - 1 :, None]
        masks = [mask[..., None].to(x.dtype) for mask in is_visible.unbind(-1)]
        last = last * (document[:, length:] == document[:, -1:])[..., None]
    return cast(Tensor, _ShortConvolution.apply(x, weight, tail, *masks)), last


class _ShortConvolution(torch.autograd.Function):
    """Goes through the spans, forward from the first and backward from the last. `masks[i]` belongs to weight i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tail: Tensor, *masks: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, tail, *masks)
        y, rows = torch.empty_like(x), upcast(weight).mT.contiguous()
        for span in _split_length(x.shape[1]):
            y[:, span] = silu(_convolve(_shift(x, tail, span, masks), rows), inplace=True)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, tail, *masks = ctx.saved_tensors
        width, rows = weight.shape[1], upcast(weight).mT.contiguous()
        x_gradient, row_gradients = torch.empty_like(x), torch.zeros_like(rows)
        carry = upcast(torch.zeros_like(tail))  # what a later span adds to the last inputs of this one
        for span in reversed(_split_length(x.shape[1])):
            shifted = _shift(x, tail, span, masks)
            slope = torch.ops.aten.silu_backward(upcast(y_gradient[:, span]), _convolve(shifted, rows))
            total = pad(slope.new_zeros(slope.shape), (0, 0, width - 1, 0))
            total[:, slope.shape[1] :] += carry
            for i, (inputs, row) in enumerate(zip(shifted, rows, strict=True)):
                row_gradients[i] += (slope * inputs).sum((0, 1))
                part = slope * masks[i][:, span] if masks else slope
                total[:, i : i + slope.shape[1]].addcmul_(part, row)
            carry = total[:, : width - 1].clone()
            x_gradient[:, span] = total[:, width - 1 :]
        return x_gradient, row_gradients.mT.to(weight.dtype), carry.to(tail.dtype), *(None for _ in masks)


def _shift(x: Tensor, tail: Tensor, span: slice, masks: Sequence[Tensor]) -> list[Tensor]:
    """For each weight its inputs `[B S D]` in the span, without those of other documents."""
    past, size = tail.shape[1], span.stop - span.start
    window = x[:, max(0, span.start - past) : span.stop]
    if span.start < past:
        window = torch.cat([tail[:, span.start :], window], 1)
    window = upcast(window)
    shifted = [window[:, i : i + size] for i in range(past + 1)]
    return [inputs * mask[:, span] for inputs, mask in zip(shifted, masks, strict=True)] if masks else shifted


def _convolve(shifted: Sequence[Tensor], rows: Tensor) -> Tensor:
    total = shifted[0] * rows[0]
    for inputs, row in zip(shifted[1:], rows[1:], strict=True):
        total.addcmul_(inputs, row)
    return total


def _split_length(length: int) -> list[slice]:
    return [slice(start, min(start + SPAN, length)) for start in range(0, length, SPAN)]


def _make_tail(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_zeros(len(x), weight.shape[1] - 1, x.shape[2])
