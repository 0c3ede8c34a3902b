"""The verbs of the command line as Python functions, with the same names and defaults."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from potstill.core.artefact import Card
from potstill.core.errors import UsageError
from potstill.objectives.named import Mixture
from potstill.pipeline.distill import Distill, Run
from potstill.pipeline.measure import Measurement
from potstill.pipeline.prune import Prune
from potstill.train.settings import Settings


def distill(
    *,
    out: str | Path,
    teacher: str | Sequence[str] | None = None,
    student: str | None = None,
    keep: float | None = None,
    params: int | None = None,
    data: str = "stdlib",
    objective: str = Mixture.name,
    cross_entropy: float = Mixture.cross_entropy,
    temperature: float = Mixture.temperature,
    tokens: int = Settings.tokens,
    lr: float = Settings.learning_rate,
    overwrite: bool = False,
    resume: bool = False,
    **more: Any,
) -> Run:
    """Distil `teacher` into a student and measure both; the run holds model, card and measures.

    Several teachers (`NAME=TEACHER` each) teach together as `combine` says: average, confidence or route:COLUMN.
    `objective` is a divergence with its options (`jsd:beta=0.3`) or `cross_entropy`; `cross_entropy` is the share of it
    that is mixed in. `more` are fields of `potstill.train.settings.Settings` (context, batch_tokens, seed, ...) and of
    `potstill.pipeline.distill.Distill` (strategy, columns, eval_data, lora, device, ...).

    Raises: PotstillError, as the command line does; UsageError for a keyword that is none of these.
    """
    known = {field.name for kind in (Settings, Distill) for field in fields(kind)} - {"settings"}
    if unknown := sorted(set(more) - known):
        raise UsageError(f"distill takes no {unknown[0]!r}; it takes {', '.join(sorted(known | {'lr'}))}")
    options = {"teacher": teacher, "student": student, "keep": keep, "params": params, "data": data, "lr": lr, **more}
    options |= {"objective": objective, "cross_entropy": cross_entropy, "temperature": temperature, "tokens": tokens}
    return Distill.from_options(options).run(Path(out), overwrite=overwrite, resume=resume)


def prune(model: str, *, out: str | Path, overwrite: bool = False, **more: Any) -> Card:
    """Cut `model` to a size; `more` are the fields of `potstill.pipeline.prune.Prune`."""
    return Prune(model=model, **more).run(Path(out), overwrite=overwrite)


def measure(*models: str, **more: Any) -> dict[str, Any]:
    """Measure models side by side; `more` are the fields of `potstill.pipeline.measure.Measurement`."""
    return Measurement(models=models, **more).run()
