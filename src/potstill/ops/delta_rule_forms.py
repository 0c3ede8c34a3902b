"""The fastest form of the delta rule: token by token, in chunks, or flash-linear-attention's kernels on a GPU.

All of them equal the definition `recurrent` in `ops.delta_rule`.
"""

from functools import cache
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from potstill.ops.delta_rule import chunked, make_memory, recurrent

SHORT = 8  # tokens up to which the recurrence is faster than one chunk


def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    gate: Float[Tensor, "B T H"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """(outputs, last memory) of `recurrent`, in the form that is fastest here.

    flash-linear-attention's kernels serve values in half precision on a GPU alone, because they take no float32.
    """
    if q.shape[1] <= SHORT:
        return recurrent(q, k, v, beta, state, gate=gate, starts=starts, scale=scale)
    if v.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and _has_kernels():
        return _run_kernels(q, k, v, beta, state, gate, starts, scale)
    return chunked(q, k, v, beta, state, gate=gate, starts=starts, scale=scale)


@cache
def _has_kernels() -> bool:
    return find_spec("fla") is not None


def _run_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    state: Tensor | None,
    gate: Tensor | None,
    starts: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The same by the kernels, for which documents are one row and each has its own first memory."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    batch, length = q.shape[:2]
    state = make_memory(q, v) if state is None else state
    edges, last = None, torch.arange(batch, device=q.device)
    tensors = [q.to(v.dtype), k.to(v.dtype), v, *([] if gate is None else [gate.float()]), beta.to(v.dtype)]
    if starts is not None:
        is_edge = starts.clone()
        is_edge[:, 0] = True
        positions = is_edge.flatten().nonzero().flatten()
        edges = torch.cat([positions, positions.new_tensor([batch * length])])
        last = is_edge.sum(1).cumsum(0) - 1
        continues = ~starts.flatten()[positions]
        state = state[positions // length] * continues[:, None, None, None]
        tensors = [x.flatten(0, 1)[None] for x in tensors]
    kernel = chunk_delta_rule if gate is None else chunk_gated_delta_rule
    y, memory = kernel(*tensors, scale=scale, initial_state=state, output_final_state=True, cu_seqlens=edges)
    return y.view(batch, length, *y.shape[2:]), memory[last]
