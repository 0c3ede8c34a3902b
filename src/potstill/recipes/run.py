"""`potstill.run`: recipes as a Python function."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.core.results import Report
from potstill.recipes.options import RecipeOptions
from potstill.recipes.registry import get_recipe
from potstill.stages.caller_objects import DataSource, ModelSource
from potstill.stages.keyword_options import take_options
from potstill.stages.sequence import run_stages


@take_options(RecipeOptions)
def run(
    recipe: str,
    *,
    out: str | Path,
    tiny: bool = False,
    teacher: ModelSource | None = None,
    data: DataSource | Sequence[str | Path] | None = None,
    preferences: DataSource | Sequence[str | Path] | None = None,
    questions: DataSource | Sequence[str | Path] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **options: Any,
) -> Report:
    """Run the recipe of a published method, such as "minima"; every stage has a folder in `out`.

    Returns the folder of the last stage, as `out`, and its card. `tiny` tries the method on a tiny budget.

    Raises: PotstillError, as the command line does.
    """
    sources: dict[str, Any] = {"teacher": teacher, "data": data, "preferences": preferences, "questions": questions}
    selected_recipe = get_recipe(recipe, tiny=tiny).override(**sources, **options)
    return Report(run_stages(selected_recipe.stages, Path(out), overwrite=overwrite, resume=resume).to_dict())
