"""What a run is going to take: memory, disk and time, from a workload and a calibration; and its short form."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from potstill.core.blueprint import Blueprint
from potstill.evaluate.size import count_blueprint_parameters
from potstill.stages.resources.calibration import Calibration
from potstill.stages.resources.layer_timing import LayerTimings
from potstill.stages.resources.workload import FLOAT32_BYTES, AutogradBytes, Workload

if TYPE_CHECKING:
    pass

GIB = 2**30
LOGIT_BYTES = (
    10  # bytes an entry of the logits that pruning's loss, which is not fused, holds: bf16, float32, its gradient
)
CALIBRATION_TOKENS = 2048  # tokens that pruning measures at once (`texts.calibration`)


@dataclass(frozen=True, kw_only=True)
class ResourceEstimate:
    """Bytes and seconds by part. `phases` are the peaks of a run's phases; the largest is the run's peak."""

    memory: dict[str, float]
    phases: dict[str, float]
    disk: dict[str, float]
    seconds: dict[str, float]
    steps: int
    tokens: float

    @property
    def peak(self) -> float:
        """The most memory that the run holds."""
        return max(self.phases.values())

    @property
    def seconds_per_step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
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
    """What `work` takes; `pruning` are the bytes that the teacher's pruning holds, beside Python."""
    memory = {**work.memory_bytes(autograd_bytes), "beside": calibration.beside}
    phases = {"loading": calibration.beside + work.loading_bytes(), "training": sum(memory.values())}
    if pruning_bytes:
        phases["pruning"] = calibration.beside + pruning_bytes
    return ResourceEstimate(
        memory=memory,
        phases=phases,
        disk=work.disk_bytes(tokenizer_bytes),
        seconds=calibration.step_seconds(work, timings),
        steps=work.settings.steps,
        tokens=work.tokens * work.passes,
    )


def estimate_pruning_bytes(teacher: Blueprint, student: Blueprint, autograd_bytes: AutogradBytes) -> float:
    """Bytes of cutting `teacher` to `student`: the model and its copy, and, where widths are cut, one pass backwards.

    `saved` is what autograd keeps in our own `Backbone`. Rougher than the rest: within a third or so.
    """
    model_bytes = 2 * FLOAT32_BYTES * float(count_blueprint_parameters(teacher).total)
    if student.hidden == teacher.hidden and set(student.layers) <= set(teacher.layers):
        return (
            model_bytes + CALIBRATION_TOKENS * teacher.vocabulary * LOGIT_BYTES / 2
        )  # whole layers go: their harm needs no gradient
    num_layers = len(teacher.layers)
    activations = (
        CALIBRATION_TOKENS * (num_layers * autograd_bytes.per_token_layer + autograd_bytes.per_token)
        + num_layers * autograd_bytes.per_layer
    )
    return model_bytes + activations + CALIBRATION_TOKENS * teacher.vocabulary * LOGIT_BYTES


def measure_tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> int:
    """What a tokenizer takes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
