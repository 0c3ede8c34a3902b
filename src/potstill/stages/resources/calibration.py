"""How much longer the parts of a step take here than the same parts alone, and what memory a step takes besides.

What the layers and the head take alone is asked of every network anew (`stages/resources/layer_timing.py`). `fitted`
compares a few real steps of the trainer with that sum; `assume` runs no step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import torch
from torch import nn

from potstill.core.errors import ArtifactError
from potstill.core.memory import read_resident_memory
from potstill.stages.resources.layer_timing import LayerTimings, measure_seconds
from potstill.stages.resources.workload import Workload

SLOWDOWN = (
    1.15  # times as long as alone that parts of a step take, where none was run; ours, of eight runs (docs/plan.md)
)
LOSS_FACTOR = 2.0  # a loss alone beside a softmax, where no step was run; ours, rough
LOSS_RATIOS = {
    "alone": 0.5,
    "cached": 0.75,
    "live": 1.0,
}  # losses beside one another, where only some were measured; rough


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The times that the layers of each part take as long as alone, seconds of the rest, and bytes beside the tensors.

    `optimiser` is seconds per trained weight. `loss` holds, by source of the teacher's signals, seconds per row and
    entry of the vocabulary (of both, where they are two) beside the products; it is that of the objective which was
    measured. `beside` is Python, torch, and the allocator's gaps.
    """

    measured: bool
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
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """What `to_dict` gave.

        Raises: ArtefactError.
        """
        names = {f.name for f in fields(cls)}
        if set(values) != names or not isinstance(values["loss"], Mapping) or not values["loss"]:
            raise ArtifactError(f"a calibration holds {', '.join(sorted(names))}; take it from potstill plan --json")
        return cls(**values)

    def step_seconds(self, work: Workload, timings: LayerTimings) -> dict[str, float]:
        """Seconds of one step by part, of networks that run at this pace."""
        tokens, rows = work.tokens * work.passes, work.rows * work.passes
        layer_times, fixed_times = layer_seconds(work, timings, tokens), fixed_seconds(work, timings)
        head_and_loss = head_seconds(work, timings, rows) + rows * work.entries_per_row * self.loss_rate(work.source)
        return {
            "teacher forward": layer_times["teacher"] * self.teacher,
            "student forward": layer_times["student"] * self.student,
            "backward": layer_times["backward"] * self.backward + fixed_times["backward"],
            "head and loss": head_and_loss + fixed_times["loss"],
            "optimiser": work.trained_parameters * self.optimiser,
        }

    def loss_rate(self, source: str) -> float:
        """The rate of `source`; where only others were measured, a guess from the first of them."""
        if source in self.loss:
            return self.loss[source]
        measured_source, rate = next(iter(self.loss.items()))
        return rate * LOSS_RATIOS[source] / LOSS_RATIOS[measured_source]


@dataclass(frozen=True, kw_only=True)
class StepMeasurements:
    """What some steps took: seconds of a step by part (medians), its tokens and trained rows, and the peak memory."""

    seconds: Mapping[str, float]
    tokens: float
    rows: float
    peak: float

    @classmethod
    def from_steps(cls, steps: Sequence[Mapping[str, float]], *, peak: float) -> "StepMeasurements":
        """The median of several steps, each its seconds by part with `tokens` and `rows`."""
        medians = {
            name: median(step.get(name, 0.0) for step in steps)
            for name in dict.fromkeys(key for step_parts in steps for key in step_parts)
        }
        return cls(seconds=medians, tokens=medians.pop("tokens"), rows=medians.pop("rows"), peak=peak)


def layer_seconds(work: Workload, timings: LayerTimings, tokens: float) -> dict[str, float]:
    """Seconds of the layers alone, for so many tokens in passes of the size of `work`'s."""
    flops, pass_tokens = work.flops(), work.tokens
    return {
        "teacher": flops["teacher forward"] * tokens * timings.teacher.seconds_at(pass_tokens),
        "student": flops["student forward"] * tokens * timings.student.seconds_at(pass_tokens),
        "backward": flops["backward"] * tokens * timings.backward.seconds_at(pass_tokens),
    }


def head_seconds(work: Workload, timings: LayerTimings, rows: float) -> float:
    """Seconds of the heads' products alone."""
    return work.flops()["head and loss"] / work.packing.trained * rows * timings.head


def fixed_seconds(work: Workload, timings: LayerTimings) -> dict[str, float]:
    """Seconds of a step that no token and no row changes: what its passes do to whole matrices."""
    forward, backward = timings.embedding_and_head
    return {
        "loss": work.passes * forward,
        "backward": work.passes * backward + work.trained_parameters * timings.clipping,
    }


def fit_calibration(
    measurements: StepMeasurements, work: Workload, timings: LayerTimings, *, tensor_bytes: float
) -> Calibration:
    """The calibration that explains what was seen; `held` are the bytes of the step's tensors, as `work` has them."""
    layer_times, fixed_times, seconds = (
        layer_seconds(work, timings, measurements.tokens),
        fixed_seconds(work, timings),
        measurements.seconds,
    )
    loss_seconds = seconds["loss"] - head_seconds(work, timings, measurements.rows) - fixed_times["loss"]
    return Calibration(
        measured=True,
        teacher=seconds["teacher"] / layer_times["teacher"] if "teacher" in seconds else 1.0,
        student=seconds["student"] / layer_times["student"],
        backward=max(0.0, seconds["backward"] - fixed_times["backward"]) / layer_times["backward"],
        optimiser=seconds["optimiser"] / work.trained_parameters,
        loss={work.source: max(0.0, loss_seconds) / (measurements.rows * work.entries_per_row)},
        beside=measurements.peak - tensor_bytes,
    )


def guess_calibration(work: Workload, device: torch.device) -> Calibration:
    """A calibration without a step: layers, a softmax and an optimiser's step, timed alone, and somewhat slower."""
    logits = torch.randn(64, min(work.vocabulary, 2**16), device=device)
    softmax_seconds = measure_seconds(lambda: logits.log_softmax(-1), device) / logits.numel()
    weights = nn.Parameter(torch.ones(2**20, device=device))
    weights.grad = torch.ones_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)
    return Calibration(
        measured=False,
        teacher=SLOWDOWN,
        student=SLOWDOWN,
        backward=SLOWDOWN,
        optimiser=measure_seconds(optimizer.step, device) / weights.numel(),
        loss={source: SLOWDOWN * LOSS_FACTOR * ratio * softmax_seconds for source, ratio in LOSS_RATIOS.items()},
        beside=float(read_resident_memory()) if device.type == "cpu" else 0.0,
    )
