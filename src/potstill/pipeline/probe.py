"""How fast the layers of a network run here: two of them, alone, forward and backward, and a product of the head's.

What an operation takes depends on the shapes that it is part of. Narrow matrices multiply at a lower rate than wide
ones; and part of a pass is the same however many tokens it has (a weight is cast to the dtype of the products, its
gradient is added to what there is). So every network is asked itself, at two numbers of tokens, and a calibration says
only how much longer real steps take.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from potstill.core import backend
from potstill.core.blueprint import Blueprint
from potstill.core.types import Needs, supervised
from potstill.data.pack import collate
from potstill.evaluate.size import forward_flops
from potstill.models.backbone import Backbone
from potstill.models.families.table import export_model
from potstill.models.signals import signals
from potstill.ops import fused
from potstill.ops.row_loss import CrossEntropyRows
from potstill.pipeline.workload import Workload, backward_flops
from potstill.train import adapters

LAYERS, VOCABULARY = 2, 64  # of the network that is timed, at its full width
TOKENS = (128, 512)  # of the two passes whose difference tells what each token takes
REPEATS, LONG = 20, 2.0  # after one that warms up; seconds after which what was seen is believed
ENTRIES = 2**24  # of a matrix that stands for larger ones: more than a processor's caches hold


class Rate(NamedTuple):
    """Seconds per operation: what each takes, and what a pass takes besides, spread over the operations of a token."""

    steady: float
    once: float

    def at(self, tokens: float) -> float:
        """In a pass of so many tokens."""
        return self.steady + self.once / tokens


class Pace(NamedTuple):
    """How fast a workload's networks run here.

    Seconds per operation: of the `teacher`, of the `student` and its `backward` (layers alone), of the `head`'s
    products. Seconds per pass: of `table`, forward and backward, what a pass does to the whole embedding and head for
    however few rows. Seconds per trained weight and step: of `clip`, its gradient's norm and scaling.
    """

    teacher: Rate
    student: Rate
    backward: Rate
    head: float
    table: tuple[float, float]
    clip: float


def pace(work: Workload, device: torch.device) -> Pace:
    """How fast the networks of `work` run on `device`: about two seconds for each, and each is asked once."""
    length = min(TOKENS[0], 2 ** round(math.log2(max(2.0, 2 * work.texture.seen - 1))))
    dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
    with backend.held_memory():  # as a run has it
        student, backward = _layers(work.student, length, dtype, device, work.lora)
        teacher = _layers(work.teacher, length, dtype, device, None)[0] if work.source == "live" else Rate(0.0, 0.0)
        table = _table(work.vocabulary, work.student.hidden, dtype, device, not work.lora)
        return Pace(teacher, student, backward, product(device, dtype, inner=work.student.hidden), table, _clip(device))


@functools.cache
def _layers(
    blueprint: Blueprint, length: int, dtype: torch.dtype, device: torch.device, lora: int | None
) -> tuple[Rate, Rate]:
    """Forward and backward of the first layers, in documents of `length` tokens; with `lora` None none is trained."""
    small = replace(blueprint, layers=blueprint.layers[:LAYERS], vocabulary=VOCABULARY)
    model: Any = export_model(Backbone(small)).to(device)
    model = adapters.add(model, lora) if lora else model
    model = model.to(dtype).eval().requires_grad_(False) if lora is None else model.train()
    few, many = (_timed(model, _text(tokens, length, device), dtype) for tokens in TOKENS)
    flops = forward_flops(small, (length + 1) / 2)
    done = flops.blocks + flops.attention, backward_flops(flops, products=1 if lora else 2)
    forward, backward = (_line(few[i], many[i], done[i]) for i in (0, 1))
    return forward, backward


def _line(few: float, many: float, flops: float) -> Rate:
    """The line through the seconds of two passes; none falls with the tokens, and none begins below zero."""
    a, b = TOKENS
    steady = max(0.0, min((many - few) / (b - a), many / b))
    return Rate(steady / flops, max(0.0, many - b * steady) / flops)


def _timed(model: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of a forward and, where anything is trained, of its backward."""
    device, trained, needs = batch["input_ids"].device, model.training, Needs(supervised(batch)[0])
    cast = torch.autocast(device.type, dtype, enabled=trained and dtype != torch.float32)

    def forward() -> Tensor:
        with cast, torch.set_grad_enabled(trained):
            return signals(model, batch, needs).rows

    return _both(forward, lambda rows: rows.float().sum().backward() if trained else None, device)


def _both(forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device) -> tuple[float, float]:
    """The least seconds of both, once warm, since what disturbs only adds: of two repeats, of more while LONG lasts."""
    times: list[tuple[float, float]] = []
    while len(times) <= REPEATS and (len(times) < 3 or sum(map(sum, times)) < LONG):
        start = now(device)
        made = forward()
        between = now(device)
        backward(made)
        times.append((between - start, now(device) - between))
    first, second = zip(*times[1:], strict=True)
    return min(first), min(second)


def _text(tokens: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """A pass of documents of `length` tokens."""
    ids = torch.arange(tokens, device=device) % VOCABULARY
    return collate([{"input_ids": ids, "labels": ids, "lengths": torch.full((tokens // length,), length)}])


@functools.cache
def _table(vocabulary: int, width: int, dtype: torch.dtype, device: torch.device, trained: bool) -> tuple[float, float]:
    """Seconds of forward and backward of one row through an embedding and a head that are one matrix."""
    some = max(1, min(vocabulary, ENTRIES // width))
    weight = nn.Parameter(torch.zeros(some, width, device=device), requires_grad=trained)
    one = torch.zeros(1, dtype=torch.long, device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            head, rows = (weight, None, 1.0, None), functional.embedding(one, weight)
            return fused.sums([CrossEntropyRows()], rows, head, targets=one, frozen={}, mix=[1.0])[0]

    seconds = _both(forward, lambda loss: loss.backward() if trained else None, device)
    return seconds[0] * vocabulary / some, seconds[1] * vocabulary / some


@functools.cache
def _clip(device: torch.device) -> float:
    """Seconds per weight of clipping a gradient."""
    weight = nn.Parameter(torch.ones(ENTRIES, device=device))
    weight.grad = torch.ones_like(weight)
    return clock(lambda: nn.utils.clip_grad_norm_([weight], 1.0), device) / ENTRIES


def product(device: torch.device, dtype: torch.dtype, *, rows: int = 512, inner: int = 576, outer: int = 8192) -> float:
    """Seconds per operation of one large product, the shape of a head's."""
    a, b = torch.ones(rows, inner, device=device, dtype=dtype), torch.ones(outer, inner, device=device, dtype=dtype)
    return clock(lambda: a @ b.mT, device) / (2 * rows * inner * outer)


def clock(job: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of `job`."""
    return _both(job, lambda _: None, device)[0]


def now(device: torch.device) -> float:
    """The time when `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
