"""The verbs of the command line as Python functions, with the same defaults."""

from pathlib import Path
from typing import Any

from potstill.core.artefact import Card
from potstill.objectives.named import Mixture
from potstill.pipeline.distill import Distill, Run
from potstill.pipeline.measure import Measurement
from potstill.pipeline.prune import Prune
from potstill.train.settings import Settings


def distill(
    *,
    teacher: str,
    out: str | Path,
    student: str | None = None,
    keep: float | None = None,
    params: int | None = None,
    data: str = "stdlib",
    objective: str | Mixture = "forward_kl",
    tokens: int = Settings.tokens,
    settings: Settings | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **stage: Any,
) -> Run:
    """Distil `teacher` into a student and measure both; the run holds model, card and measures.

    `objective` is a name with options (`jsd:beta=0.3`) or a `Mixture`. `settings` replaces every training default, and
    `tokens` with it. Further keywords are the fields of `potstill.pipeline.distill.Distill`.

    Raises: PotstillError, as the command line does.
    """
    default = Mixture()
    mixture = (
        objective
        if isinstance(objective, Mixture)
        else Mixture.parse(objective, cross_entropy=default.cross_entropy, temperature=default.temperature)
    )
    chosen = Distill(
        teacher=teacher,
        student=student,
        keep=keep,
        params=params,
        data=data,
        objective=mixture,
        settings=Settings(tokens=tokens) if settings is None else settings,
        **stage,
    )
    return chosen.run(Path(out), overwrite=overwrite, resume=resume)


def prune(model: str, *, out: str | Path, overwrite: bool = False, **stage: Any) -> Card:
    """Cut `model` to a size; keywords are the fields of `potstill.pipeline.prune.Prune`."""
    return Prune(model=model, **stage).run(Path(out), overwrite=overwrite)


def measure(*models: str, **stage: Any) -> dict[str, Any]:
    """Measure models side by side; keywords are the fields of `potstill.pipeline.measure.Measurement`."""
    return Measurement(models=models, **stage).run()
