"""An element-wise linear recurrence, each channel by itself: the definition of the state of gated linear RNNs.

    h_t = f_t h_{t-1} + u_t        h_0 given, or 0

`recurrence_loop` is the definition, one step after another. `linear_recurrence` is the same function in about 2 sqrt(T)
steps: chunks of sqrt(T) tokens run beside each other from a state of 0, and with the product of their f. Then the state
enters chunk after chunk. It divides by nothing, so no f overflows, and f = 0 forgets all that was before.

The gradient is a recurrence too, backwards in time (arXiv:1709.04057, section 2.2):

    g_t = dh_t + f_{t+1} g_{t+1}        du_t = g_t        df_t = g_t h_{t-1}        dh_0 = f_1 g_1

So the backward keeps f and h alone, O(T D).
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

Memory = Float[Tensor, "B D"]


def recurrence_loop(
    decay: Float[Tensor, "B T D"], inputs: Float[Tensor, "B T D"], state: Memory | None = None
) -> Float[Tensor, "B T D"]:
    """The definition: h of every token."""
    h = torch.zeros_like(inputs[:, 0]) if state is None else state
    states = []
    for f, u in zip(decay.unbind(1), inputs.unbind(1), strict=True):
        h = f * h + u
        states.append(h)
    return torch.stack(states, 1)


def linear_recurrence(
    decay: Float[Tensor, "B T D"], inputs: Float[Tensor, "B T D"], state: Memory | None = None
) -> Float[Tensor, "B T D"]:
    """h of every token; the last one is the state for the tokens that follow. Equals `recurrence_loop`."""
    h: Tensor = _LinearRecurrence.apply(decay, inputs, state)
    return h


class _LinearRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, state: Tensor | None) -> Tensor:
        h = _scan(decay, inputs, state)
        ctx.save_for_backward(decay, h, state)
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        decay, h, state = ctx.saved_tensors
        next_decay = pad(decay[:, 1:], (0, 0, 0, 1))
        slope = _scan(next_decay.flip(1), upstream.flip(1), None).flip(1)
        first = torch.zeros_like(h[:, :1]) if state is None else state[:, None]
        previous = torch.cat([first, h[:, :-1]], 1)
        return slope * previous, slope, None if state is None else decay[:, 0] * slope[:, 0]


def _scan(decay: Tensor, inputs: Tensor, state: Tensor | None) -> Tensor:
    length = inputs.shape[1]
    size = math.isqrt(length - 1) + 1
    extra = -length % size
    products, h = (pad(x, (0, 0, 0, extra)).unflatten(1, (-1, size)).clone() for x in (decay, inputs))
    for i in range(1, size):
        h[:, :, i].addcmul_(products[:, :, i], h[:, :, i - 1])
        products[:, :, i] *= products[:, :, i - 1]
    entry = torch.zeros_like(inputs[:, 0]) if state is None else state
    entries = []
    for last_product, last_h in zip(products[:, :, -1].unbind(1), h[:, :, -1].unbind(1), strict=True):
        entries.append(entry)
        entry = torch.addcmul(last_h, last_product, entry)
    return h.addcmul_(products, torch.stack(entries, 1)[:, :, None]).flatten(1, 2)[:, :length]
