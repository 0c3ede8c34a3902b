"""Sums over rows of losses of logits, without the logits of all rows in memory.

    S_k = sum_n loss_k(logits(rows[n]), teachers' logits of row n, targets[n])      logits(x) = cap(scale (x W^T + b))

`sum_row_losses_densely` is the definition: all logits [N V] at once, ordinary autograd. `sum_row_losses` is the same
function of rows, weight and bias in chunks of rows. In the forward, it backpropagates each chunk from its logits to
rows, weight and bias, so it computes no logits twice. For this it needs the weights of the sums in the loss beforehand:
`mix`. A backward with other weights is correct too, by a second pass.

A loss of whole sequences takes `likelihoods`, inputs that depend on log q(target) of several rows (`ops.row_spans`).
The pass then computes log q(target) of a span from the logits that are in memory, before it differentiates the losses.

The losses are those of `ops.row_loss`; they get float32 at least. A `Differentiable` loss gives its own derivative, and
losses that `SupportsSharedSoftmax` share one softmax. All others go through autograd, few rows at a time.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear

from potstill.ops import layout
from potstill.ops.head_gradients import HeadGradients, make_accumulators
from potstill.ops.loss_mix import differentiate_losses, find_common_factor, normalize_mix
from potstill.ops.precision import get_product_dtype, get_wide_dtype, upcast
from potstill.ops.row_loss import CrossEntropyRows, RowInput, RowLoss
from potstill.ops.row_spans import LikelihoodInputs, Span, plan_spans, split_span
from potstill.ops.softmax import Softmax, cross_entropy_slope

HeadLike = tuple[Tensor, Tensor | None, float, float | None]  # weight [V F], bias [V], scale, softcap
FrozenInputs = Mapping[
    str, Callable[[int, int], RowInput]
]  # name -> function of (start, stop) that gives the input of these rows

CHUNK_LOGITS = 2**25  # logits of one chunk: 64 MiB in bf16
BLOCK = 2**18  # logits of one block on a CPU, 1 MiB in float32, or one row for each core: fits the cores' caches


def sum_row_losses_densely(
    losses: Sequence[RowLoss],
    rows: Float[Tensor, "N F"],
    head: HeadLike,
    *,
    targets: Int[Tensor, " N"],
    frozen: FrozenInputs,
    likelihoods: Sequence[LikelihoodInputs] = (),
) -> tuple[Float[Tensor, ""], ...]:
    """The definition: every loss summed over all rows, from all logits at once, by ordinary autograd."""
    student = upcast(_compute_logits(rows, head))
    with torch.no_grad():
        inputs = {name: _upcast_input(read_rows(0, len(rows))) for name, read_rows in frozen.items()}
        log_q = -CrossEntropyRows()(student, {}, targets)
        for source in likelihoods:
            inputs |= source.compute(0, log_q)
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
    likelihoods: Sequence[LikelihoodInputs] = (),
    chunk: int | None = None,
) -> tuple[Float[Tensor, ""], ...]:
    """The sum over rows of each loss, one scalar each, in chunks of rows; differentiable by rows, weight and bias.

    Logits have the dtype of `rows` (under autocast, autocast's); losses and the head's gradient are in float32 at
    least. It reads each input once for each chunk, without gradients. `mix[k]` is the weight of the k-th sum in the
    loss to differentiate, up to a common factor; a sum of weight 0 is only measured. It computes only the required
    gradients. `likelihoods` are further inputs; with them a chunk holds whole units. `chunk` is the number of
    rows at once, by default `rows_per_chunk`.

    Raises: ValueError if `mix`, `targets` or the rows of an input do not fit, or `chunk` is below 1.
    """
    if len(mix) != len(losses) or not all(map(math.isfinite, mix)):
        raise ValueError(f"mix = {tuple(mix)} must give one finite weight to each of the {len(losses)} losses")
    if len(targets) != len(rows):
        raise ValueError(f"{len(targets)} targets for {len(rows)} rows: give each row its target")
    weight, bias, scale, softcap = head
    rows, chunk = _pad_rows(rows, likelihoods), _check_chunk(chunk, len(weight), likelihoods)
    problem = _LossProblem(tuple(losses), targets, frozen, scale, softcap, chunk, tuple(likelihoods))
    if torch.is_grad_enabled():
        totals = _FusedSums.apply(rows, weight, bias, problem, tuple(mix))
    else:
        totals = _compute_sums(problem, rows, weight, bias, HeadGradients(None, None, None), mix)
    return tuple(totals[k] for k in range(len(losses)))  # not unbind, whose views refuse `total += other`


@torch.no_grad()
def compute_log_likelihoods(
    rows: Float[Tensor, "N F"],
    head: HeadLike,
    targets: Int[Tensor, " N"],
    *,
    units: Int[Tensor, " N"] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, " N"]:
    """log q(target) of each row, by the same products of the same shapes as in `sum_row_losses` with these `units`.

    So a frozen copy of a model gives the same numbers as the model, bit by bit.
    """
    weight, bias, scale, softcap = head
    likelihoods = () if units is None else (LikelihoodInputs(units, lambda start, log_q: {}),)
    rows, chunk = _pad_rows(rows, likelihoods), _check_chunk(chunk, len(weight), likelihoods)
    problem = _LossProblem((), targets, {}, scale, softcap, chunk, likelihoods)
    chunk_logits = _ChunkLogits(problem, rows, weight, bias)
    parts = [_compute_log_q(problem, chunk_logits, span) for span in plan_spans(len(targets), chunk, likelihoods)]
    return torch.cat([rows.new_zeros(0, dtype=get_wide_dtype(rows.dtype)), *parts])


def _pad_rows(rows: Tensor, likelihoods: Sequence[LikelihoodInputs]) -> Tensor:
    """`rows` in the dtype of products, and zeros for products of round shapes, wherever the last chunk begins."""
    rows = rows.to(get_product_dtype(rows))
    if likelihoods and len(rows):
        return torch.cat([rows, rows.new_zeros(layout.ROW_MULTIPLE - 1, rows.shape[1])])
    return layout.pad_to_multiple(rows)


def _check_chunk(chunk: int | None, vocabulary: int, likelihoods: Sequence[LikelihoodInputs]) -> int:
    """The number of rows at once. Raises: ValueError if it is below 1."""
    if chunk is None:
        chunk = rows_per_chunk(vocabulary)
        return chunk - chunk % layout.ROW_MULTIPLE or chunk if likelihoods else chunk
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} rows at a time: choose 1 or more")
    return chunk


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
    likelihoods: tuple[LikelihoodInputs, ...] = ()


class _FusedSums(torch.autograd.Function):
    """Computes the gradient of sum_k mix[k] S_k in the forward, and returns it, scaled, in the backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, problem: _LossProblem, mix: tuple[float, ...]
    ) -> Tensor:
        ctx.problem, (ctx.mix, _) = problem, normalize_mix(mix)
        ctx.save_for_backward(rows, weight, bias)
        device = rows.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.gradients = make_accumulators(rows, weight, bias, ctx.needs_input_grad)
        return _compute_sums(problem, rows, weight, bias, ctx.gradients, ctx.mix)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias = ctx.saved_tensors
        gradients: HeadGradients | None = ctx.gradients
        factor: Tensor | float | None = find_common_factor(upstream, ctx.mix)
        ctx.gradients = None  # scaled in place; a second backward computes them again
        if gradients is None or factor is None:
            mix, factor = normalize_mix(upstream.tolist())
            gradients = make_accumulators(rows, weight, bias, ctx.needs_input_grad)
            with torch.no_grad(), torch.autocast(*ctx.autocast):
                _compute_sums(ctx.problem, rows, weight, bias, gradients, mix)
        scaled_gradients = (None if gradient is None else gradient.mul_(factor) for gradient in gradients)
        return (*scaled_gradients, None, None)


def _compute_sums(
    problem: _LossProblem,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradients: HeadGradients,
    mix: Sequence[float],
) -> Float[Tensor, " K"]:
    """The sums; adds the gradients of sum_k mix[k] S_k to `gradients`."""
    chunk_logits = _ChunkLogits(problem, rows, weight, bias)
    totals = rows.new_zeros(len(problem.losses), dtype=get_wide_dtype(rows.dtype))
    needs_gradient = any(gradient is not None for gradient in gradients)
    for span in plan_spans(len(problem.targets), problem.chunk, problem.likelihoods):
        span_inputs = _compute_likelihood_inputs(problem, chunk_logits, span)
        for start, stop in split_span(span, problem.chunk):
            chunk_inputs = _read_frozen(problem.frozen, start, stop)
            chunk_inputs |= {name: values[start - span[0] : stop - span[0]] for name, values in span_inputs.items()}
            targets, logits = problem.targets[start:stop], chunk_logits.compute(start, stop)
            for block in split_rows(logits):
                block_inputs = {name: _upcast_input(row_input[block]) for name, row_input in chunk_inputs.items()}
                values = _compute_block(
                    problem, logits[block], block_inputs, targets[block], mix if needs_gradient else None
                )
                for total, value in zip(totals, values, strict=True):
                    total += value.sum()
            if needs_gradient:
                gradients.add(start, *chunk_logits.release_derivative())
            del chunk_inputs, block_inputs  # frees their memory for the next chunk
    return totals


class _ChunkLogits:
    """The logits of one chunk at a time, in one buffer for all chunks, against fragmentation.

    A product may have more rows than the chunk: padding, or the rows after it (`layout.pad_to_multiple`).
    """

    def __init__(self, problem: _LossProblem, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.rows, self.weight, self.problem = rows, weight.to(rows.dtype), problem
        self.head = (self.weight, bias, problem.scale, problem.softcap)
        self.buffer = rows.new_empty(min(layout.round_up(problem.chunk), len(rows)), len(weight))
        self.span: Span | None = None  # the chunk whose logits are in the buffer

    def compute(self, start: int, stop: int) -> Float[Tensor, "C V"]:
        """The logits of rows `start` to `stop`, which the caller may overwrite by their derivative."""
        if self.span != (start, stop):
            rows = self._select_rows(start, stop)
            _write_logits(self.buffer[: len(rows)], rows, self.head)
            self.span = (start, stop)
        return self.buffer[: stop - start]

    def release_derivative(self) -> tuple[Float[Tensor, "C V"], Float[Tensor, "C F"], Float[Tensor, "V F"]]:
        """The buffer with the derivative of the chunk, 0 at the other rows of its product; these rows; the weight."""
        assert self.span is not None
        (start, stop), self.span = self.span, None
        rows = self._select_rows(start, stop)
        self.buffer[stop - start : len(rows)] = 0
        return self.buffer[: len(rows)], rows, self.weight

    def _select_rows(self, start: int, stop: int) -> Float[Tensor, "C F"]:
        size = layout.round_up(stop - start) if self.problem.likelihoods else self.problem.chunk
        return self.rows[start : start + size]


def _compute_likelihood_inputs(problem: _LossProblem, chunk_logits: _ChunkLogits, span: Span) -> dict[str, RowInput]:
    """The inputs of the rows of a span by name, from log q(target) of all of them."""
    inputs: dict[str, RowInput] = {}
    if problem.likelihoods:
        log_q = _compute_log_q(problem, chunk_logits, span)
        for source in problem.likelihoods:
            inputs |= source.compute(span[0], log_q)
    return inputs


def _compute_log_q(problem: _LossProblem, chunk_logits: _ChunkLogits, span: Span) -> Float[Tensor, " C"]:
    """log q(target) of each row of a span. The logits of a span that is one chunk stay in the buffer."""
    parts = []
    with torch.autocast(problem.targets.device.type, enabled=False):
        for start, stop in split_span(span, problem.chunk):
            logits, targets = chunk_logits.compute(start, stop), problem.targets[start:stop]
            for block in split_rows(logits):
                parts.append(-cross_entropy_slope(Softmax(upcast(logits[block])), targets[block]).values)
    return torch.cat(parts)


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
        values, delta = differentiate_losses(problem.losses, student, inputs, targets, mix)
        logits.copy_(_differentiate_head(delta, student, problem))
    return values


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
