"""The commands `distill`, `prune` and `measure` as Python functions, with the same options and defaults."""

import inspect
from pathlib import Path
from typing import Any

from potstill.core.card import Card
from potstill.core.errors import UsageError
from potstill.core.options import list_options, make_signature
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill as run_distill
from potstill.stages.measure import MeasureConfig
from potstill.stages.options import DistillOptions
from potstill.stages.prune import PruneConfig
from potstill.stages.training import TrainingResult


def distill(*, out: str | Path, overwrite: bool = False, resume: bool = False, **options: Any) -> TrainingResult:
    """Train a small student to predict like a teacher, and measure both; write the model and its card to `out`.

    `options` are the options of `potstill distill` by the same names, such as `teacher`, `keep`, `data`, `objective`,
    `tokens` and `lr`, and the other fields of `DistillConfig` and `TrainConfig`. `inspect.signature(distill)` and
    `help(distill)` list them with their defaults. Give several teachers as a sequence of `NAME=TEACHER`.

    Raises: PotstillError, as the command line does; UsageError for an unknown option.
    """
    names = {option.name for option in list_options(DistillOptions)} | {"learning_rate"}
    if unknown_names := sorted(set(options) - names):
        raise UsageError(f"distill has no option {unknown_names[0]!r}; it has {', '.join(sorted(names))}")
    return run_distill(DistillConfig.from_options(options), Path(out), overwrite=overwrite, resume=resume)


distill.__signature__ = make_signature(  # type: ignore[attr-defined]
    DistillOptions,
    *[p for p in inspect.signature(distill).parameters.values() if p.kind is p.KEYWORD_ONLY],
    returns=TrainingResult,
)


def prune(model: str, *, out: str | Path, overwrite: bool = False, **options: Any) -> Card:
    """Prune `model` to a number of parameters; `options` are the fields of `PruneConfig`."""
    return PruneConfig(model=model, **options).run(Path(out), overwrite=overwrite)


def measure(*models: str, **options: Any) -> dict[str, Any]:
    """Measure the quality and speed of models; `options` are the fields of `MeasureConfig`."""
    return MeasureConfig(models=models, **options).run()
