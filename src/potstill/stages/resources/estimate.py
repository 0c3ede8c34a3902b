"""Estimates the memory, disk and time of a run from a workload and a calibration."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.core.blueprint import Blueprint
from potstill.evaluate.size import count_blueprint_parameters
from potstill.stages.resources.activation_memory import AutogradBytes
from potstill.stages.resources.calibration import Calibration
from potstill.stages.resources.layer_timing import LayerTimings
from potstill.stages.resources.workload import FLOAT32_BYTES, Workload

GIB = 2**30
LOGIT_BYTES = 10  # per logit in pruning, whose loss is not fused: bfloat16, float32, and the float32 gradient
CALIBRATION_TOKENS = 2048  # tokens in a pass of pruning's measurements


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
    """Bytes and seconds of a run by part.

    `phases` are the peak bytes of loading, training and pruning. `seconds` are those of one step, `tokens` its tokens.
    """

    memory: dict[str, float]
    phases: dict[str, float]
    disk: dict[str, float]
    seconds: dict[str, float]
    steps: int
    tokens: float

    @property
    def peak(self) -> float:
        """The largest memory of any phase, in bytes."""
        return max(self.phases.values())

    @property
    def seconds_per_step(self) -> float:
        """Seconds of one step."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        time = {
            "steps": self.steps,
            "seconds_per_step": self.seconds_per_step,
            "parts": self.seconds,
            "seconds": self.seconds_per_step * self.steps,
            "tokens_per_second": self.tokens / self.seconds_per_step,
        }
        return {"memory": {**self.memory, "peak": self.peak}, "phases": self.phases, "disk": self.disk, "time": time}


def estimate(
    work: Workload,
    autograd_bytes: AutogradBytes,
    timings: LayerTimings,
    calibration: Calibration,
    *,
    tokenizer_bytes: int,
    pruning_bytes: float = 0.0,
) -> ResourceEstimate:
    """The memory, disk and time of `work`. `pruning_bytes` are those of `estimate_pruning_bytes`, if it prunes."""
    memory = {**work.memory_bytes(autograd_bytes), "other": calibration.overhead}
    phases = {"loading": calibration.overhead + work.loading_bytes(), "training": sum(memory.values())}
    if pruning_bytes:
        phases["pruning"] = calibration.overhead + pruning_bytes
    return ResourceEstimate(
        memory=memory,
        phases=phases,
        disk=work.disk_bytes(tokenizer_bytes),
        seconds=calibration.step_seconds(work, timings),
        steps=work.settings.steps,
        tokens=work.tokens * work.passes,
    )


def estimate_pruning_bytes(teacher: Blueprint, student: Blueprint, autograd_bytes: AutogradBytes) -> float:
    """Bytes to prune `teacher` to `student`: the model, its copy and, where widths are cut, one backward.

    `autograd_bytes` are those of our own `Backbone`. This is rougher than the other estimates, within about a third.
    """
    model_bytes = 2 * FLOAT32_BYTES * float(count_blueprint_parameters(teacher).total)
    if student.hidden == teacher.hidden and set(student.layers) <= set(teacher.layers):
        # Only whole layers are removed, and their importance needs no gradient.
        return model_bytes + CALIBRATION_TOKENS * teacher.vocabulary * LOGIT_BYTES / 2
    num_layers = len(teacher.layers)
    activations = (
        CALIBRATION_TOKENS * (num_layers * autograd_bytes.per_token_layer + autograd_bytes.per_token)
        + num_layers * autograd_bytes.per_layer
    )
    return model_bytes + activations + CALIBRATION_TOKENS * teacher.vocabulary * LOGIT_BYTES


def measure_tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of a saved tokenizer on disk."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
