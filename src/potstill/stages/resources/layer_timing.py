"""Measures the speed of a network's layers on this machine: each kind of layer alone, and a product of the head.

The time of an operation depends on the shapes around it. Narrow matrices multiply at a lower rate than wide ones. Part
of a pass takes the same time for any number of tokens: it casts each weight to the dtype of the products, and adds each
gradient to the sum. So potstill times every network, at two numbers of tokens. A calibration has only the factor
between real steps and these times.
"""

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from potstill.core.blueprint import Blueprint
from potstill.core.memory import retain_freed_memory
from potstill.core.types import Needs, supervised_positions
from potstill.data.packing import collate
from potstill.evaluate.size import forward_flops
from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model
from potstill.models.signals import compute_signals
from potstill.ops import fused
from potstill.ops.row_loss import CrossEntropyRows
from potstill.stages.resources.workload import Workload, backward_flops
from potstill.train.lora import add_adapters

PROBE_LAYERS, PROBE_VOCABULARY = 2, 64  # layers of one kind in a timed network, at their full width; its vocabulary
PROBE_TOKENS = (128, 512)  # of two passes, whose difference is the time of the tokens
MAX_REPEATS, MAX_PROBE_SECONDS = 20, 2.0  # repeats after one that warms up; no repeat starts after these seconds
PROBE_ENTRIES = 2**24  # of a probe matrix: more than a processor's caches hold


PRODUCT_SIZE = 2048  # rows and columns of the product whose rate a guess is made from
GUESSED_SHARE = 0.55  # rate of whole steps over that of a large product: mean of ten runs, 0.44 to 0.63 (docs/plan.md)


class Rate(NamedTuple):
    """Seconds per operation, and the fixed seconds of a pass divided by the operations of one token."""

    per_operation: float
    fixed: float

    def seconds_at(self, tokens: float) -> float:
        """Seconds per operation in a pass of `tokens` tokens."""
        return self.per_operation + self.fixed / tokens


class LayerTimings(NamedTuple):
    """The speed of a workload's networks on this machine.

    Seconds per operation: of the `teacher`, of the `student` and its `backward` (layers alone), of the `head`'s
    products. Seconds per pass, forward and backward: of `embedding_and_head`, the work on both whole matrices whatever
    the number of rows. Seconds per trained weight and step: of `clipping`, the norm and scaling of its gradient.
    """

    teacher: Rate
    student: Rate
    backward: Rate
    head: float
    embedding_and_head: tuple[float, float]
    clipping: float


def measure_layer_timings(work: Workload, device: torch.device) -> LayerTimings:
    """How fast the networks of `work` run on `device`: about two seconds for each kind of layer, each timed once."""
    length = min(PROBE_TOKENS[0], 2 ** round(math.log2(max(2.0, 2 * work.packing.seen - 1))))
    dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
    with retain_freed_memory():  # as in a run
        student, backward = _measure_layers(work.student, length, dtype, device, work.lora)
        teacher = (
            _measure_layers(work.teacher, length, dtype, device, None)[0] if work.source == "live" else Rate(0.0, 0.0)
        )
        table = _measure_embedding_and_head(work.vocabulary, work.student.hidden, dtype, device, not work.lora)
        return LayerTimings(
            teacher,
            student,
            backward,
            measure_product_seconds(device, dtype, inner=work.student.hidden),
            table,
            _measure_clipping(device),
        )


def guess_layer_timings(work: Workload, device: torch.device) -> LayerTimings:
    """Timings from one measured number: the seconds per operation of one large matrix product.

    It assumes that all operations of a step run at 0.55 of that rate. The share includes the time of everything else in
    a step, so fixed times are 0.
    """
    seconds = _measure_large_product(torch.bfloat16 if work.compute_bytes == 2 else torch.float32, device)
    rate = Rate(seconds / GUESSED_SHARE, 0.0)
    return LayerTimings(rate, rate, rate, head=rate.per_operation, embedding_and_head=(0.0, 0.0), clipping=0.0)


@functools.cache
def _measure_large_product(dtype: torch.dtype, device: torch.device) -> float:
    return measure_product_seconds(device, dtype, rows=PRODUCT_SIZE, inner=PRODUCT_SIZE, outer=PRODUCT_SIZE)


def _measure_layers(
    blueprint: Blueprint, length: int, dtype: torch.dtype, device: torch.device, lora: int | None
) -> tuple[Rate, Rate]:
    """Forward and backward of all layers, in documents of `length` tokens; with `lora` None nothing is trained.

    It times each kind of layer separately. The rate of all is the mean over them, weighted by their operations. It
    times layers without their depth gates, because operations count the share of the tokens that runs.
    """
    rates, operations = [], []
    for layer, count in Counter(replace(layer, depth=None) for layer in blueprint.layers).items():
        alike = replace(blueprint, layers=(layer,) * PROBE_LAYERS, vocabulary=PROBE_VOCABULARY)
        rates.append(_measure_equal_layers(alike, length, dtype, device, lora))
        operations.append(count * _count_operations(alike, length, lora)[0])
    if len(rates) == 1:
        return rates[0]
    forward, backward = (_average_rate(kind_rates, operations) for kind_rates in zip(*rates, strict=True))
    return forward, backward


def _average_rate(rates: Sequence[Rate], operations: Sequence[float]) -> Rate:
    per_operation, fixed = (
        sum(value * n for value, n in zip(values, operations, strict=True)) / sum(operations)
        for values in zip(*rates, strict=True)
    )
    return Rate(per_operation, fixed)


def _count_operations(blueprint: Blueprint, length: int, lora: int | None) -> tuple[float, float]:
    """Operations per token of the layers, forward and backward, in documents of `length` tokens."""
    flops = forward_flops(blueprint, (length + 1) / 2)
    return flops.blocks + flops.attention, backward_flops(flops, products=1.0 if lora else 2.0)


@functools.cache
def _measure_equal_layers(
    small_blueprint: Blueprint, length: int, dtype: torch.dtype, device: torch.device, lora: int | None
) -> tuple[Rate, Rate]:
    """Forward and backward of a network of a few equal layers."""
    model: Any = export_model(Backbone(small_blueprint)).to(device)
    model = add_adapters(model, lora) if lora else model
    model = model.to(dtype).eval().requires_grad_(False) if lora is None else model.train()
    short_pass, long_pass = (
        _measure_pass(model, _make_batch(tokens, length, device), dtype) for tokens in PROBE_TOKENS
    )
    operations = _count_operations(small_blueprint, length, lora)
    forward, backward = (_fit_rate(short_pass[i], long_pass[i], operations[i]) for i in (0, 1))
    return forward, backward


def _fit_rate(short_seconds: float, long_seconds: float, flops: float) -> Rate:
    """The line through the seconds of two passes, with a slope and an intercept of at least zero."""
    short_tokens, long_tokens = PROBE_TOKENS
    per_operation = max(
        0.0, min((long_seconds - short_seconds) / (long_tokens - short_tokens), long_seconds / long_tokens)
    )
    return Rate(per_operation / flops, max(0.0, long_seconds - long_tokens * per_operation) / flops)


def _measure_pass(model: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a forward and, if anything is trained, of its backward."""
    device, is_trained, needs = batch["input_ids"].device, model.training, Needs(supervised_positions(batch)[0])
    autocast = torch.autocast(device.type, dtype, enabled=is_trained and dtype != torch.float32)

    def forward() -> Tensor:
        with autocast, torch.set_grad_enabled(is_trained):
            return compute_signals(model, batch, needs).rows

    return _measure_forward_backward(
        forward, lambda rows: rows.float().sum().backward() if is_trained else None, device
    )


def _measure_forward_backward(
    forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device
) -> tuple[float, float]:
    """The least seconds of both, since disturbances only add: of two or more repeats after a warm-up."""
    times: list[tuple[float, float]] = []
    while len(times) <= MAX_REPEATS and (len(times) < 3 or sum(map(sum, times)) < MAX_PROBE_SECONDS):
        start = synchronized_time(device)
        output = forward()
        middle = synchronized_time(device)
        backward(output)
        times.append((middle - start, synchronized_time(device) - middle))
    forward_seconds, backward_seconds = zip(*times[1:], strict=True)
    return min(forward_seconds), min(backward_seconds)


def _make_batch(tokens: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """A pass of documents of `length` tokens."""
    ids = torch.arange(tokens, device=device) % PROBE_VOCABULARY
    return collate([{"input_ids": ids, "labels": ids, "lengths": torch.full((tokens // length,), length)}])


@functools.cache
def _measure_embedding_and_head(
    vocabulary: int, width: int, dtype: torch.dtype, device: torch.device, is_trained: bool
) -> tuple[float, float]:
    """Seconds of forward and backward of one row through an embedding and a head that are one matrix."""
    num_entries = max(1, min(vocabulary, PROBE_ENTRIES // width))
    weight = nn.Parameter(torch.zeros(num_entries, width, device=device), requires_grad=is_trained)
    token_id = torch.zeros(1, dtype=torch.long, device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            head, rows = (weight, None, 1.0, None), functional.embedding(token_id, weight)
            return fused.sum_row_losses([CrossEntropyRows()], rows, head, targets=token_id, frozen={}, mix=[1.0])[0]

    seconds = _measure_forward_backward(forward, lambda loss: loss.backward() if is_trained else None, device)
    return seconds[0] * vocabulary / num_entries, seconds[1] * vocabulary / num_entries


@functools.cache
def _measure_clipping(device: torch.device) -> float:
    """Seconds per weight of clipping a gradient."""
    weight = nn.Parameter(torch.ones(PROBE_ENTRIES, device=device))
    weight.grad = torch.ones_like(weight)
    return measure_seconds(lambda: nn.utils.clip_grad_norm_([weight], 1.0), device) / PROBE_ENTRIES


def measure_product_seconds(
    device: torch.device, dtype: torch.dtype, *, rows: int = 512, inner: int = 576, outer: int = 8192
) -> float:
    """Seconds per operation of one large product, the shape of a head's."""
    a, b = torch.ones(rows, inner, device=device, dtype=dtype), torch.ones(outer, inner, device=device, dtype=dtype)
    return measure_seconds(lambda: a @ b.mT, device) / (2 * rows * inner * outer)


def measure_seconds(job: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of `job`."""
    return _measure_forward_backward(job, lambda _: None, device)[0]


def synchronized_time(device: torch.device) -> float:
    """The time once `device` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
