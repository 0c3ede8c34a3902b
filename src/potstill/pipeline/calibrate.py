"""How fast this machine does the parts of a step, and what memory a step takes beside what can be counted.

`measure` runs a few real steps of the one trainer on real packs and clocks them from outside, by hooks: whatever the
step is made of, its rates follow. `assume` runs no step: it times a product, a softmax and the optimiser alone.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from potstill.core.errors import ArtefactError
from potstill.pipeline.room import resident
from potstill.pipeline.workload import Workload

EFFICIENCY = 0.5  # of a plain product's rate that a network's blocks reach, where no step was run; ours, rough
LOSS = 2.0  # a loss beside a softmax, where no step was run; ours, rough
BESIDE = 400 * 2**20  # bytes of torch's kernels and the allocator's gaps, where no step was run; ours, rough
NEAR = {"alone": 0.5, "cached": 0.75, "live": 1.0}  # losses beside one another, where only some were measured; rough


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Seconds per operation of the parts of a step, and bytes beside its tensors (Python, torch, the allocator's gaps).

    `loss` holds, by source of the teacher's signals, seconds per row and entry of the vocabulary (of both, where they
    are two) beside the products; it is that of the objective which was measured.
    """

    measured: bool
    gemm: float
    teacher: float
    student: float
    backward: float
    optimiser: float
    loss: Mapping[str, float] = field(default_factory=dict)
    beside: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Calibration":
        """What `to_dict` gave.

        Raises: ArtefactError.
        """
        names = {one.name for one in fields(cls)}
        if set(found) != names or not isinstance(found["loss"], Mapping) or not found["loss"]:
            raise ArtefactError(f"a calibration holds {', '.join(sorted(names))}; take it from potstill plan --json")
        return cls(**found)

    def seconds(self, work: Workload) -> dict[str, float]:
        """Seconds of one step by part."""
        flops, tokens, rows = work.flops(), work.tokens * work.passes, work.rows * work.passes
        head = flops["head and loss"] * tokens * self.gemm + rows * work.entries * self.loss_of(work.source)
        return {
            "teacher forward": flops["teacher forward"] * tokens * self.teacher,
            "student forward": flops["student forward"] * tokens * self.student,
            "backward": flops["backward"] * tokens * self.backward,
            "head and loss": head,
            "optimiser": work.trained * self.optimiser,
        }

    def loss_of(self, source: str) -> float:
        """The rate of `source`; where only others were measured, a guess from the first of them."""
        if source in self.loss:
            return self.loss[source]
        known, rate = next(iter(self.loss.items()))
        return rate * NEAR[source] / NEAR[known]


def merged(several: Sequence[Calibration]) -> Calibration:
    """The mean of several calibrations; each counts for what it measured."""
    names = ("gemm", "student", "backward", "optimiser", "beside")
    means: dict[str, Any] = {name: fmean(getattr(one, name) for one in several) for name in names}
    taught = [one.teacher for one in several if "live" in one.loss] or [several[0].teacher]
    sources = sorted({source for one in several for source in one.loss})
    losses = {source: fmean(one.loss[source] for one in several if source in one.loss) for source in sources}
    return replace(several[0], **means, teacher=fmean(taught), loss=losses)


@dataclass(frozen=True, kw_only=True)
class Clocked:
    """What some steps took: seconds of a step by part (medians), its tokens and trained rows, and the peak memory."""

    seconds: Mapping[str, float]
    tokens: float
    rows: float
    peak: float

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, float]], *, peak: float) -> "Clocked":
        """The median of several steps, each its seconds by part with `tokens` and `rows`."""
        found = {
            name: median(step.get(name, 0.0) for step in steps) for name in dict.fromkeys(k for s in steps for k in s)
        }
        return cls(seconds=found, tokens=found.pop("tokens"), rows=found.pop("rows"), peak=peak)


def fitted(seen: Clocked, work: Workload, *, held: float, gemm: float) -> Calibration:
    """The rates that explain what was seen; `held` are the bytes of the step's tensors, as `work` counts them."""
    flops, seconds = work.flops(), seen.seconds
    products = flops["head and loss"] / work.texture.trained * seen.rows * gemm

    def rate(part: str, name: str, default: float) -> float:
        done = flops[name] * seen.tokens
        return seconds.get(part, 0.0) / done if done else default

    student = rate("student", "student forward", gemm)
    return Calibration(
        measured=True,
        gemm=gemm,
        teacher=rate("teacher", "teacher forward", student),
        student=student,
        backward=rate("backward", "backward", student),
        optimiser=seconds["optimiser"] / work.trained,
        loss={work.source: (seconds["loss"] - products) / (seen.rows * work.entries)},
        beside=seen.peak - held,
    )


def assume(work: Workload, device: torch.device, dtype: torch.dtype) -> Calibration:
    """Rates without a step: from a product, a softmax and an optimiser's step alone. Within a factor of two or so."""
    gemm = product(device, dtype)
    table = torch.randn(64, min(work.vocabulary, 2**16), device=device)
    softmax = clock(lambda: table.log_softmax(-1), device) / table.numel()
    weights = nn.Parameter(torch.ones(2**20, device=device))
    weights.grad = torch.ones_like(weights)
    optimiser = torch.optim.AdamW([weights], fused=True)
    blocks = gemm / EFFICIENCY
    return Calibration(
        measured=False,
        gemm=gemm,
        teacher=blocks,
        student=blocks,
        backward=blocks,
        optimiser=clock(optimiser.step, device) / weights.numel(),
        loss={source: LOSS * factor * softmax for source, factor in NEAR.items()},
        beside=float(resident() + BESIDE) if device.type == "cpu" else 0.0,
    )


def product(device: torch.device, dtype: torch.dtype, *, rows: int = 512, inner: int = 576, outer: int = 8192) -> float:
    """Seconds per operation of one large product, the shape of a head's."""
    a, b = torch.ones(rows, inner, device=device, dtype=dtype), torch.ones(outer, inner, device=device, dtype=dtype)
    return clock(lambda: a @ b.mT, device) / (2 * rows * inner * outer)


def clock(job: Callable[[], Any], device: torch.device, *, repeats: int = 5) -> float:
    """Seconds of `job`, the median of several after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = now(device)
        job()
        times.append(now(device) - start)
    return median(times[1:])


def now(device: torch.device) -> float:
    """The time when `device` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
