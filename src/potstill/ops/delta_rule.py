"""The delta rule and the gated delta rule: a memory that corrects what it predicts for each key.

    M_t = exp(g_t) S_{t-1}                       the gate decays the memory; without one M_t = S_{t-1}
    S_t = M_t + beta_t k_t (v_t - M_t^T k_t)^T   the error of the prediction for the key is written
    y_t = scale S_t^T q_t                        the query reads after the write

DeltaNet (arXiv:2406.06484, Section 2.2) and Gated DeltaNet (arXiv:2412.06464, Eq. 10). The memory S has K rows and V
columns. With keys of length 1 and beta in [0, 1] no step lengthens a column of it; beta up to 2 gives eigenvalues from
-1 to 1.

`recurrent` is this definition, token by token. `chunked` is the same function in chunks of C tokens, whose products are
large (arXiv:2412.06464, Section 3.3). With D_ij = exp(g_{j+1} + ... + g_i) for i >= j, else 0, and the memory S at
the entry of the chunk:

    L = tril(diag(beta) (K K^T * D), -1)        A = (I + L)^{-1} diag(beta)
    E = A (V - diag(a) K S)                     the errors, beta_t (v_t - M_t^T k_t) in each row
    Y = scale (diag(a) Q S + (Q K^T * D) E)     a_i = exp(g_1 + ... + g_i)
    S' = a_C S + K^T diag(b) E                  b_i = D_Ci

Documents of a packed row begin with an empty memory, anywhere in a chunk. D_ij is 0 between two documents, and a_i is 0
from the first start in the chunk on. Sums are float32, or float64 for values in float64.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from potstill.ops.precision import get_wide_dtype, upcast

CHUNK = 32  # tokens; on two CPU cores it is faster than 16 and 64 where heads are 64 wide
SPAN = 512  # tokens whose chunks are one batch: few enough for a CPU's cache


def recurrent(
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
    """(outputs in the dtype of `v`, last memory), token by token: the definition.

    `gate` is the logarithm of the decay, at most 0. `starts` is True at the first token of each document, which reads
    nothing earlier, `state` included. `scale` is 1 / sqrt(K) by default.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    memory = make_memory(q, v) if state is None else upcast(state)
    dtype, (q, k, v, beta) = v.dtype, (upcast(x) for x in (q, k, v, beta))
    decay = torch.ones_like(beta) if gate is None else upcast(gate).exp()
    decay = decay if starts is None else decay * ~starts[..., None]
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[1]):
            memory, key = decay[:, t, :, None, None] * memory, k[:, t, :, None]
            error = v[:, t, :, None] - key @ memory
            memory = memory + (beta[:, t, :, None, None] * key).mT @ error
            outputs.append(scale * q[:, t, :, None] @ memory)
    return torch.cat(outputs, 2).transpose(1, 2).to(dtype), memory


def chunked(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    *,
    gate: Float[Tensor, "B T H"] | None = None,
    starts: Bool[Tensor, "B T"] | None = None,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """What `recurrent` gives, in value and in every gradient, by chunks of `chunk` tokens.

    For the backward pass it stores its inputs, and one memory for every `SPAN` tokens. It computes all else again.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = make_memory(q, v) if state is None else state
    return cast(tuple[Tensor, Tensor], _Chunked.apply(q, k, v, beta, gate, starts, state, scale, chunk))


def make_memory(q: Float[Tensor, "B T H K"], v: Float[Tensor, "B T H V"]) -> Float[Tensor, "B H K V"]:
    """An empty memory for queries and values of these shapes."""
    batch, _, heads, width = q.shape
    return q.new_zeros(batch, heads, width, v.shape[-1], dtype=get_wide_dtype(v.dtype))


class _Chunked(torch.autograd.Function):
    """Goes through the spans, forward from the first and backward from the last."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        gate: Tensor | None,
        starts: Tensor | None,
        state: Tensor,
        scale: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        y, memories = torch.empty_like(v), [upcast(state).flatten(0, 1)]
        with torch.autocast(q.device.type, enabled=False):
            for span in _split_length(q.shape[1], chunk):
                chunks = _Chunks(*_cut((q, k, v, beta, gate, starts), span), scale=scale, chunk=chunk)
                states, errors = chunks.scan(memories[-1])
                memories.append(states[-1].clone())
                _write(y[:, span], chunks.read(states[:-1], errors))
        ctx.save_for_backward(q, k, v, beta, gate, starts, torch.stack(memories[:-1]))
        ctx.scale, ctx.chunk, ctx.state_shape, ctx.state_dtype = scale, chunk, state.shape, state.dtype
        return y, memories[-1].view(state.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, y_gradient: Tensor, memory_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, memories = ctx.saved_tensors
        gradients = [None if x is None else torch.empty_like(x) for x in inputs[:5]]
        memory_gradient = memory_gradient.flatten(0, 1)
        spans = [*zip(_split_length(y_gradient.shape[1], ctx.chunk), memories, strict=True)]
        with torch.autocast(y_gradient.device.type, enabled=False):
            for span, memory in reversed(spans):
                chunks = _Chunks(*_cut(inputs, span), scale=ctx.scale, chunk=ctx.chunk)
                parts, memory_gradient = chunks.backward(memory, y_gradient[:, span], memory_gradient)
                for gradient, part in zip(gradients, parts, strict=True):
                    if gradient is not None and part is not None:
                        _write(gradient[:, span], part)
        return *gradients, None, memory_gradient.view(ctx.state_shape).to(ctx.state_dtype), None, None


class _Chunks:
    """N chunks of C tokens for G = B H heads, and what depends on no memory; tensors are `[N G C ...]`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        gate: Tensor | None,
        starts: Tensor | None,
        *,
        scale: float,
        chunk: int,
    ) -> None:
        self.scale, self.has_gate = scale, gate is not None
        self.q, self.k, self.v, self.beta = (_read(x, chunk) for x in (q, k, v, beta[..., None]))
        self.same, self.entry = _find_documents(starts, chunk, self.k, heads=q.shape[2])
        self.decay = self.same
        if gate is not None:
            logs = self.same @ _read(gate[..., None], chunk)
            self.decay = (logs - logs.mT).masked_fill_(self.same == 0, -torch.inf).exp_()
            self.entry = self.entry * logs.exp()
        self.keep = self.entry[..., -1:, :].expand(*self.k.shape[:2], 1, 1)
        self.exit = self.decay[..., -1, :, None]
        self.exit_keys = self.exit * self.k
        system = _multiply(self.k, self.k.mT).mul_(self.decay).mul_(self.beta)
        identity = torch.eye(chunk, dtype=system.dtype, device=system.device).expand_as(system)
        self.inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
        correction = self.inverse * self.beta.mT
        self.values = _multiply(correction, self.v)  # A V
        self.readers = _multiply(correction.mul_(self.entry.mT), self.k)  # A diag(a) K

    def scan(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(memories `[N+1 G K V]` before each chunk and after the last, errors E). The errors replace `values`."""
        states = memory.new_empty(len(self.k) + 1, *memory.shape)
        states[0] = memory
        rows = zip(self.values, self.readers, self.exit_keys.mT, self.keep, states, states[1:], strict=False)
        for errors, readers, exit_keys, keep, entry, end in rows:
            errors.baddbmm_(readers, entry, alpha=-1)
            torch.bmm(exit_keys, errors, out=end).addcmul_(keep, entry)
        return states, self.values

    def read(self, states: Tensor, errors: Tensor) -> Tensor:
        """The outputs, from the memory before each chunk."""
        return _add_product(_multiply(self.q, states).mul_(self.scale * self.entry), self._score(), errors)

    def backward(
        self, memory: Tensor, y_gradient: Tensor, memory_gradient: Tensor
    ) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """(gradients of q, k, v, beta and gate; gradient of `memory`), from those of the outputs and the last memory.

        With `d` for a gradient, and R = (I + L)^{-T} dE, the gradient of diag(beta) (V - diag(a) K S):

            dE = scores^T dY + diag(b) K dS'        dS = a_C dS' + Q^T diag(scale a) dY - (A diag(a) K)^T dE
            dL = -tril(R E^T, -1)                   dV = diag(beta) R

        The sum g_1 + ... + g_i multiplies all that token i reads, by its query or its key, by its exponential, and
        divides all that it writes. So its gradient is q_i dq_i + k_i (dk_i as reader - dk_i as writer).
        """
        states, errors = self.scan(memory)
        dy, scores = _read(y_gradient, self.k.shape[2]), self._score()
        derrors, dscores = _multiply(scores.mT, dy), _multiply(dy, errors.mT)
        dy.mul_(self.scale * self.entry)
        dstates = self._scan_back(derrors, _multiply(self.q.mT, dy), memory_gradient)
        entries, exits = states[:-1], dstates[1:]

        dsimilarity = dscores.mul_(self.decay).mul_(self.scale)
        dq = _add_product(_multiply(dy, entries.mT), dsimilarity, self.k)
        residual = _multiply(self.inverse.mT, derrors)  # R
        dsystem = _multiply(residual, errors.mT).neg_().tril_(-1).mul_(self.decay)
        reader = _multiply(residual, entries.mT).mul_(-self.entry)
        reader = _add_product(reader, dsystem, self.k)  # over beta
        writer = _add_product(_multiply(errors, exits.mT).mul_(self.exit), dsimilarity.mT, self.q)
        writer = _add_product(writer, dsystem.mul_(self.beta).mT, self.k)
        reader_dot = _dot(self.k, reader)
        dbeta = _dot(self.v, residual) + reader_dot
        dgate = None
        if self.has_gate:
            dlogs = _dot(self.q, dq) + self.beta * reader_dot - _dot(self.k, writer)
            dlogs[..., -1:, :] += _dot(exits.flatten(2), states[1:].flatten(2))[..., None]
            dgate = (self.same.mT @ dlogs)[..., 0]
        dk = writer.addcmul_(self.beta, reader)
        return (dq, dk, residual.mul_(self.beta), dbeta[..., 0], dgate), dstates[0]

    def _scan_back(self, derrors: Tensor, reads: Tensor, memory_gradient: Tensor) -> Tensor:
        """The gradients of the memories, `[N+1 G K V]`; `derrors` gets what the memories add to it, in place."""
        dstates = torch.cat((reads, memory_gradient[None]))
        rows = zip(derrors, self.readers.mT, self.exit_keys, self.keep, dstates, dstates[1:], strict=False)
        for derror, readers, exit_keys, keep, entry, end in reversed([*rows]):
            derror.baddbmm_(exit_keys, end)
            entry.baddbmm_(readers, derror, alpha=-1).addcmul_(keep, end)
        return dstates

    def _score(self) -> Tensor:
        return _multiply(self.q, self.k.mT).mul_(self.decay).mul_(self.scale)


def _find_documents(starts: Tensor | None, chunk: int, like: Tensor, *, heads: int) -> tuple[Tensor, Tensor]:
    """(1 for the earlier tokens of the same document and the token itself `[.. C C]`, 1 before any start `[.. C 1]`).

    Both are `[N G ...]` with `starts [B T]`, and `[1 1 ...]` without.
    """
    causal = like.new_ones(chunk, chunk).tril_()
    if starts is None:
        return causal[None, None], causal[None, None, :, :1]
    document = _read(starts[..., None, None], chunk).squeeze(-1).cumsum(-1)
    same = causal * (document[..., :, None] == document[..., None, :])
    before = (document == 0).to(like.dtype)[..., None]
    return same.repeat_interleave(heads, 1), before.repeat_interleave(heads, 1)


def _split_length(length: int, chunk: int) -> Iterator[slice]:
    step = max(1, SPAN // chunk) * chunk
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _cut(tensors: Sequence[Tensor | None], span: slice) -> Any:
    return (x if x is None else x[:, span] for x in tensors)


def _read(x: Tensor, chunk: int) -> Tensor:
    """`[B T H D]` as chunks `[N G C D]`, upcast, with zeros after the end."""
    x = upcast(x)
    if missing := -x.shape[1] % chunk:
        x = pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).flatten(1, 2).contiguous()


def _write(target: Tensor, chunks: Tensor) -> None:
    """Copies chunks `[N G C ...]` to `target [B T H ...]`."""
    batch, length, heads = target.shape[:3]
    rows = chunks.unflatten(1, (batch, heads)).movedim(3, 2).transpose(0, 1)  # [B N C H ...]
    whole = length // rows.shape[2] * rows.shape[2]
    target[:, :whole].unflatten(1, (-1, rows.shape[2])).copy_(rows[:, : whole // rows.shape[2]])
    if whole < length:
        target[:, whole:] = rows[:, -1, : length - whole]


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    total.view(-1, *total.shape[2:]).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return total


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
