"""Sums over rows of losses of logits, without the logits of all rows in memory.

    S_k = sum_n loss_k(logits(rows[n]), teachers' logits of row n, targets[n])      logits(x) = cap(scale (x W^T + b))

`sum_row_losses_densely` is the definition: all logits [N V] at once, ordinary autograd. `sum_row_losses` is the same
function of rows, weight and bias in chunks of rows. In the forward, it backpropagates each chunk from its logits to
rows, weight and bias, so it computes no logits twice. For this it needs the weights of the sums in the loss beforehand:
`mix`. A backward with other weights is correct too, by a second pass.

The losses are those of `ops.row_loss`; they get float32 at least. A `Differentiable` loss gives its own derivative, and
losses that `SupportsSharedSoftmax` share one softmax. All others go through autograd, few rows at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from potstill.ops.layout import pad_to_multiple
from potstill.ops.precision import get_wide_dtype, upcast
from potstill.ops.row_loss import Differentiable, RowInput, RowLoss
from potstill.ops.softmax import Softmax, combine_slopes, get_slope

HeadLike = tuple[Tensor, Tensor | None, float, float | None]  # weight [V F], bias [V], scale, softcap
FrozenInputs = Mapping[
    str, Callable[[int, int], RowInput]
]  # name -> function of (start, stop) that gives the input of these rows

CHUNK_LOGITS = 2**25  # logits of one chunk: 64 MiB in bf16
TOKEN_BLOCK = 2**10  # rows of the head whose gradient is added at once on a CPU
BLOCK = 2**18  # logits of one block on a CPU, 1 MiB in float32, or one row for each core: fits the cores' caches


def sum_row_losses_densely(
    losses: Sequence[RowLoss],
    rows: Float[Tensor, "N F"],
    head: HeadLike,
    *,
    targets: Int[Tensor, " N"],
    frozen: FrozenInputs,
) -> tuple[Float[Tensor, ""], ...]:
    """The definition: every loss summed over all rows, from all logits at once, by ordinary autograd."""
    student = upcast(_compute_logits(rows, head))
    with torch.no_grad():
        inputs = {name: _upcast_input(read_rows(0, len(rows))) for name, read_rows in frozen.items()}
    with torch.autocast(rows.device.type, enabled=False):
        return tuple(loss(student, inputs, targets).sum() for loss in losses)


def sum_row_losses(
    losses: Sequence[RowLoss],
    rows: Float[Tensor, "N F"],
    head: HeadLike,
    *,
    targets: Int[Tensor, " N"],
    frozen: FrozenInputs,
    mix: Sequence[float],
    chunk: int | None = None,
) -> tuple[Float[Tensor, ""], ...]:
    """The sum over rows of each loss, one scalar each, in chunks of rows; differentiable by rows, weight and bias.

    Logits have the dtype of `rows` (under autocast, autocast's); losses and the head's gradient are in float32 at
    least. It reads each input once for each chunk, without gradients. `mix[k]` is the weight of the k-th sum in the
    loss to differentiate, up to a common factor; a sum of weight 0 is only measured. It computes only the required
    gradients. `chunk` is the number of rows at once, by default `rows_per_chunk`.

    Raises: ValueError if `mix`, `targets` or the rows of an input do not fit, or `chunk` is below 1.
    """
    if len(mix) != len(losses) or not all(map(math.isfinite, mix)):
        raise ValueError(f"mix = {tuple(mix)} must give one finite weight to each of the {len(losses)} losses")
    if len(targets) != len(rows):
        raise ValueError(f"{len(targets)} targets for {len(rows)} rows: give each row its target")
    if chunk is None:
        chunk = rows_per_chunk(len(head[0]))
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} rows at a time: choose 1 or more")
    weight, bias, scale, softcap = head
    rows = pad_to_multiple(rows.to(get_product_dtype(rows)))
    problem = _LossProblem(tuple(losses), targets, frozen, scale, softcap, chunk)
    if torch.is_grad_enabled():
        totals = _FusedSums.apply(rows, weight, bias, problem, tuple(mix))
    else:
        totals = _compute_sums(problem, rows, weight, bias, _Gradients(None, None, None), mix)
    return tuple(totals[k] for k in range(len(losses)))  # not unbind, whose views refuse `total += other`


def rows_per_chunk(vocabulary: int) -> int:
    """The number of rows whose logits are alive at once: fewer for larger vocabularies, for the same memory."""
    return min(1024, max(1, CHUNK_LOGITS // vocabulary))


class _LossProblem(NamedTuple):
    losses: tuple[RowLoss, ...]
    targets: Tensor
    frozen: FrozenInputs
    scale: float
    softcap: float | None
    chunk: int


class _Gradients(NamedTuple):
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


class _FusedSums(torch.autograd.Function):
    """Computes the gradient of sum_k mix[k] S_k in the forward, and returns it, scaled, in the backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, problem: _LossProblem, mix: tuple[float, ...]
    ) -> Tensor:
        ctx.problem, (ctx.mix, _) = problem, _normalize_mix(mix)
        ctx.save_for_backward(rows, weight, bias)
        device = rows.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.gradients = _make_accumulators(rows, weight, bias, ctx.needs_input_grad)
        return _compute_sums(problem, rows, weight, bias, ctx.gradients, ctx.mix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        gradients: _Gradients | None = ctx.gradients
        factor: Tensor | float | None = _find_common_factor(upstream, ctx.mix)
        ctx.gradients = None  # scaled in place; a second backward computes them again
        if gradients is None or factor is None:
            mix, factor = _normalize_mix(upstream.tolist())
            gradients = _make_accumulators(rows, weight, bias, ctx.needs_input_grad)
            with torch.no_grad(), torch.autocast(*ctx.autocast):
                _compute_sums(ctx.problem, rows, weight, bias, gradients, mix)
        scaled_gradients = (None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        return (*scaled_gradients, None, None)


def _compute_sums(
    problem: _LossProblem,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradients: _Gradients,
    mix: Sequence[float],
) -> Float[Tensor, " K"]:
    """The sums; adds the gradients of sum_k mix[k] S_k to `gradients`."""
    weight = weight.to(rows.dtype)
    head = (weight, bias, problem.scale, problem.softcap)
    totals = rows.new_zeros(len(problem.losses), dtype=get_wide_dtype(rows.dtype))
    needs_gradient = any(gradient is not None for gradient in gradients)
    buffer = rows.new_empty(min(problem.chunk, len(rows)), len(weight))  # one for all chunks, against fragmentation
    for start in range(0, len(problem.targets), problem.chunk):
        chunk_rows = rows[start : start + problem.chunk]  # the last ones may be padding
        logits = _write_logits(buffer[: len(chunk_rows)], chunk_rows, head)
        chunk_logits = logits[: len(problem.targets) - start]
        chunk_inputs = _read_frozen(problem.frozen, start, start + len(chunk_logits))
        chunk_targets = problem.targets[start : start + len(chunk_logits)]
        for block in split_rows(chunk_logits):
            block_inputs = {name: _upcast_input(row_input[block]) for name, row_input in chunk_inputs.items()}
            values = _compute_block(
                problem, chunk_logits[block], block_inputs, chunk_targets[block], mix if needs_gradient else None
            )
            for total, value in zip(totals, values, strict=True):
                total += value.sum()
        if needs_gradient:
            logits[len(chunk_logits) :] = 0
            gradients.add(
                start, logits, chunk_rows, weight
            )  # `_compute_block` has replaced the logits by their derivative
        del chunk_inputs, block_inputs  # frees their memory for the next chunk
    return totals


def _compute_block(
    problem: _LossProblem,
    logits: Float[Tensor, "C V"],
    inputs: Mapping[str, RowInput],
    targets: Int[Tensor, " C"],
    mix: Sequence[float] | None,
) -> list[Tensor]:
    """The values of each loss; with a `mix`, `logits` are overwritten by the derivative of sum_k mix[k] loss_k."""
    student = upcast(logits)
    with torch.autocast(
        logits.device.type, enabled=False
    ):  # autocast would compute products inside a loss in half precision
        if mix is None:
            return [loss(student, inputs, targets) for loss in problem.losses]
        values, delta = _differentiate(problem.losses, student, inputs, targets, mix)
        logits.copy_(_differentiate_head(delta, student, problem))
    return values


def _differentiate(
    losses: Sequence[RowLoss], student: Tensor, frozen: Mapping[str, RowInput], targets: Tensor, mix: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    """The values of each loss, and the derivative of sum_k mix[k] loss_k by the logits."""
    softmax, slopes = Softmax(student), []
    values: dict[int, Tensor] = {}
    delta = None
    for k, (loss, weight) in enumerate(zip(losses, mix, strict=True)):
        if weight == 0:
            values[k] = loss(student, frozen, targets)
        elif (slope := get_slope(loss, softmax, frozen, targets)) is not None:
            values[k] = slope.values
            slopes.append((weight, slope))
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


def _compute_logits(rows: Float[Tensor, "N F"], head: HeadLike) -> Float[Tensor, "N V"]:
    """The head's logits, in the dtype of `rows`."""
    weight, bias, scale, softcap = head
    logits = linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _write_logits(buffer: Float[Tensor, "C V"], rows: Float[Tensor, "C F"], head: HeadLike) -> Float[Tensor, "C V"]:
    """`buffer` filled as by `_compute_logits`; the weight has the dtype of `rows` already."""
    weight, bias, scale, softcap = head
    if bias is None:
        torch.mm(rows, weight.mT, out=buffer)
    else:
        torch.addmm(bias.to(rows.dtype), rows, weight.mT, out=buffer)
    if scale != 1:
        buffer.mul_(scale)
    return buffer if softcap is None else buffer.div_(softcap).tanh_().mul_(softcap)


def _differentiate_head(delta: Tensor, logits: Tensor, problem: _LossProblem) -> Tensor:
    """The derivative by rows W^T + b from `delta`, that by the logits, which it overwrites."""
    if problem.softcap is not None:
        delta.mul_(1 - (logits / problem.softcap).square_())
    return delta.mul_(problem.scale) if problem.scale != 1 else delta


def _read_frozen(frozen: FrozenInputs, start: int, stop: int) -> dict[str, RowInput]:
    inputs = {name: source(start, stop) for name, source in frozen.items()}
    for name, source in inputs.items():
        if len(source) != stop - start:
            raise ValueError(f"{name!r} gave {len(source)} rows for rows {start} to {stop}")
    return inputs


def _upcast_input(row_input: RowInput) -> RowInput:
    return upcast(row_input) if isinstance(row_input, Tensor) and row_input.is_floating_point() else row_input


def split_rows(logits: Float[Tensor, "C V"]) -> Iterator[slice]:
    """Blocks of rows that fit a CPU's caches, the same number for each core; one block on other devices.

    A softmax needs whole rows; other devices pay for each kernel launch.
    """
    size, cores = len(logits), torch.get_num_threads()
    if logits.device.type == "cpu":
        size = max(1, BLOCK // (cores * logits.shape[1])) * cores
    return (slice(start, start + size) for start in range(0, len(logits), max(1, size)))


def _split_tokens(delta: Float[Tensor, "C V"]) -> Iterator[slice]:
    """Blocks of tokens on a CPU, where adding bf16 to float32 first makes a float32 copy; all tokens elsewhere."""
    size = TOKEN_BLOCK if delta.device.type == "cpu" else delta.shape[1]
    return (slice(start, start + size) for start in range(0, delta.shape[1], size))


def _make_accumulators(rows: Tensor, weight: Tensor, bias: Tensor | None, needs_gradient: Sequence[bool]) -> _Gradients:
    wide = get_wide_dtype(rows.dtype)
    return _Gradients(
        rows=torch.zeros_like(rows) if needs_gradient[0] else None,
        weight=(torch.empty_like if len(rows) else torch.zeros_like)(weight, dtype=wide) if needs_gradient[1] else None,
        bias=torch.zeros_like(bias, dtype=wide) if bias is not None and needs_gradient[2] else None,
    )


def _normalize_mix(mix: Sequence[float]) -> tuple[tuple[float, ...], float]:
    """(mix / unit, unit) with largest weight 1, so that derivatives divided by a large count survive half precision."""
    unit = max(map(abs, mix), default=0.0) or 1.0
    return tuple(weight / unit for weight in mix), unit


def _find_common_factor(upstream: Float[Tensor, " K"], mix: Sequence[float]) -> Tensor | None:
    """c if upstream = c mix up to rounding, else None."""
    expected = upstream.new_tensor(mix)
    largest = expected.abs().argmax()
    factor = upstream[largest] / expected[largest]
    expected = factor * expected
    tolerance = 16 * torch.finfo(upstream.dtype).eps
    return factor if bool(((upstream - expected).abs() <= tolerance * expected.abs()).all()) else None


def get_product_dtype(rows: Tensor) -> torch.dtype:
    """The dtype of a product with `rows` in the present context: under autocast, autocast's."""
    device = rows.device.type
    uses_autocast = torch.is_autocast_enabled(device) and rows.dtype != torch.float64  # autocast leaves float64 alone
    return torch.get_autocast_dtype(device) if uses_autocast else rows.dtype
