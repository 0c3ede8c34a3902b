"""Calibrations: the time of parts of a real step relative to the same parts alone, and the step's extra memory.

`layer_timing.py` times the layers and the head of each network alone. `fit_calibration` compares a few real steps of
the trainer with these timings. `guess_calibration` is for plans that run no step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import torch

from potstill.core.errors import ArtifactError
from potstill.core.memory import read_resident_memory
from potstill.stages.resources.layer_timing import LayerTimings
from potstill.stages.resources.workload import Workload

SAMPLING = "sampling"  # the part of a step in which a rollout writes
LOSS_RATIOS = {"alone": 0.5, "cached": 0.75, "live": 1.0}  # relative time of a loss by source; ours, rough


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Slowdown factors of the layers, seconds of everything else, and bytes that are not tensors of the step.

    `teacher`, `student` and `backward` are the time of the layers in a step, divided by their time alone. `optimizer`
    is seconds per trained weight. `loss` is seconds per row and vocabulary entry (of both vocabularies, where they
    differ), without the matrix products, by the source of the teacher's signals. It is valid for the measured
    objective. `overhead` is the bytes of Python, torch and the allocator's gaps; files call it `other`. `measured`:
    whether it comes from real steps.
    """

    measured: bool
    teacher: float
    student: float
    backward: float
    optimizer: float
    loss: Mapping[str, float] = field(default_factory=dict)
    overhead: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return {"other" if name == "overhead" else name: value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """The calibration that `to_dict` wrote.

        Raises: ArtifactError if keys are missing or unknown.
        """
        names = {"other" if f.name == "overhead" else f.name for f in fields(cls)}
        if set(values) != names or not isinstance(values["loss"], Mapping) or not values["loss"]:
            raise ArtifactError(
                f"a calibration has the keys {', '.join(sorted(names))}; take one from potstill plan --json"
            )
        return cls(**{"overhead" if name == "other" else name: value for name, value in values.items()})

    def step_seconds(self, work: Workload, timings: LayerTimings) -> dict[str, float]:
        """Seconds of one step by part, for networks with these timings."""
        tokens, rows = work.tokens * work.passes, work.rows * work.passes
        layer_times, constant_times = layer_seconds(work, timings, tokens), constant_seconds(work, timings)
        head_and_loss = head_seconds(work, timings, rows) + rows * work.entries_per_row * self.loss_rate(work.source)
        return {
            "teacher forward": layer_times["teacher"] * self.teacher,
            "student forward": layer_times["student"] * self.student,
            "backward": layer_times["backward"] * self.backward + constant_times["backward"],
            "head and loss": head_and_loss + constant_times["loss"],
            "optimizer": work.trained_parameters * self.optimizer,
        }

    def loss_rate(self, source: str) -> float:
        """Seconds per row and entry for `source`. If only others were measured, a guess from the first of them."""
        if source in self.loss:
            return self.loss[source]
        measured_source, rate = next(iter(self.loss.items()))
        return rate * LOSS_RATIOS[source] / LOSS_RATIOS[measured_source]


@dataclass(frozen=True, kw_only=True)
class StepMeasurements:
    """Measured steps: median seconds of each part, tokens and trained rows of a step, and peak memory in bytes."""

    seconds: Mapping[str, float]
    tokens: float
    rows: float
    peak: float

    @classmethod
    def from_steps(
        cls, steps: Sequence[Mapping[str, float]], *, peak: float, draws: Sequence[float] = (), updates: int = 1
    ) -> "StepMeasurements":
        """The medians over several steps. Each step maps parts to seconds, and has `tokens` and `rows`.

        `draws` are the seconds of each time that a rollout sampled, for `updates` steps. Their median for one step is
        the part `sampling`.
        """
        names = dict.fromkeys(key for step_parts in steps for key in step_parts if key != SAMPLING)
        medians = {name: median(step.get(name, 0.0) for step in steps) for name in names}
        if draws:
            medians[SAMPLING] = median(draws) / updates
        return cls(seconds=medians, tokens=medians.pop("tokens"), rows=medians.pop("rows"), peak=peak)


def layer_seconds(work: Workload, timings: LayerTimings, tokens: float) -> dict[str, float]:
    """Seconds of the layers alone for `tokens` tokens, in passes of the size in `work`."""
    flops, pass_tokens = work.flops(), work.tokens
    return {
        "teacher": flops["teacher forward"] * tokens * timings.teacher.seconds_at(pass_tokens),
        "student": flops["student forward"] * tokens * timings.student.seconds_at(pass_tokens),
        "backward": flops["backward"] * tokens * timings.backward.seconds_at(pass_tokens),
    }


def head_seconds(work: Workload, timings: LayerTimings, rows: float) -> float:
    """Seconds of the matrix products of the heads alone, for `rows` trained positions."""
    return work.flops()["head and loss"] / work.packing.trained * rows * timings.head


def constant_seconds(work: Workload, timings: LayerTimings) -> dict[str, float]:
    """Seconds of a step that don't depend on tokens or rows: work on whole matrices in each pass, and clipping."""
    forward, backward = timings.embedding_and_head
    return {
        "loss": work.passes * forward,
        "backward": work.passes * backward + work.trained_parameters * timings.clipping,
    }


def fit_calibration(
    measurements: StepMeasurements, work: Workload, timings: LayerTimings, *, tensor_bytes: float
) -> Calibration:
    """The calibration with which `work` takes the measured time and memory.

    `tensor_bytes` are the bytes of the step's tensors, as `Workload.memory_bytes` counts them.
    """
    layer_times, constant_times, seconds = (
        layer_seconds(work, timings, measurements.tokens),
        constant_seconds(work, timings),
        measurements.seconds,
    )
    loss_seconds = seconds["loss"] - head_seconds(work, timings, measurements.rows) - constant_times["loss"]
    return Calibration(
        measured=True,
        teacher=seconds["teacher"] / layer_times["teacher"] if "teacher" in seconds else 1.0,
        student=seconds["student"] / layer_times["student"],
        backward=max(0.0, seconds["backward"] - constant_times["backward"]) / layer_times["backward"],
        optimizer=seconds["optimizer"] / work.trained_parameters,
        loss={work.source: max(0.0, loss_seconds) / (measurements.rows * work.entries_per_row)},
        overhead=measurements.peak - tensor_bytes,
    )


def guess_calibration(device: torch.device) -> Calibration:
    """A calibration without real steps, for `guess_layer_timings`, which already include everything in a step."""
    return Calibration(
        measured=False,
        teacher=1.0,
        student=1.0,
        backward=1.0,
        optimizer=0.0,
        loss=dict.fromkeys(LOSS_RATIOS, 0.0),
        overhead=float(read_resident_memory()) if device.type == "cpu" else 0.0,
    )
