"""The verbs of the command line as Python functions, with the same names and defaults."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from potstill.core.card import Card
from potstill.core.errors import UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill as run_distill
from potstill.stages.measure import MeasureConfig
from potstill.stages.prune import PruneConfig
from potstill.stages.training import TrainingResult
from potstill.train.config import TrainConfig


def distill(
    *,
    out: str | Path,
    teacher: str | Sequence[str] | None = None,
    student: str | None = None,
    keep: float | None = None,
    params: int | None = None,
    data: str = "stdlib",
    objective: str = ObjectiveConfig.name,
    cross_entropy: float = ObjectiveConfig.cross_entropy,
    temperature: float = ObjectiveConfig.temperature,
    tokens: int = TrainConfig.tokens,
    lr: float = TrainConfig.learning_rate,
    overwrite: bool = False,
    resume: bool = False,
    **kwargs: Any,
) -> TrainingResult:
    """Distil `teacher` into a student and measure both; the run holds model, card and measures.

    Several teachers (`NAME=TEACHER` each) teach together as `combine` says: average, confidence or route:COLUMN.
    `objective` is a divergence with its options (`jsd:beta=0.3`) or `cross_entropy`; `cross_entropy` is the share of it
    that is mixed in. `more` are fields of `potstill.train.config.TrainConfig` (context, batch_tokens, seed, ...) and of
    `potstill.stages.distill.config.DistillConfig` (strategy, columns, eval_data, lora, device, ...).

    Raises: PotstillError, as the command line does; UsageError for a keyword that is none of these.
    """
    option_names = {field.name for config_class in (TrainConfig, DistillConfig) for field in fields(config_class)} - {
        "settings"
    }
    if unknown_names := sorted(set(kwargs) - option_names):
        raise UsageError(f"distill takes no {unknown_names[0]!r}; it takes {', '.join(sorted(option_names | {'lr'}))}")
    options = {"teacher": teacher, "student": student, "keep": keep, "params": params, "data": data, "lr": lr, **kwargs}
    options |= {"objective": objective, "cross_entropy": cross_entropy, "temperature": temperature, "tokens": tokens}
    return run_distill(DistillConfig.from_options(options), Path(out), overwrite=overwrite, resume=resume)


def prune(model: str, *, out: str | Path, overwrite: bool = False, **kwargs: Any) -> Card:
    """Cut `model` to a size; `more` are the fields of `potstill.stages.prune.PruneConfig`."""
    return PruneConfig(model=model, **kwargs).run(Path(out), overwrite=overwrite)


def measure(*models: str, **kwargs: Any) -> dict[str, Any]:
    """Measure models side by side; `more` are the fields of `potstill.stages.measure.MeasureConfig`."""
    return MeasureConfig(models=models, **kwargs).run()
