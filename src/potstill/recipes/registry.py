"""The class of a recipe, and every recipe by name."""

import importlib
import pkgutil
from dataclasses import dataclass, replace
from typing import Any

import potstill.recipes
from potstill.core.errors import NotFound, UsageError
from potstill.core.suggestions import suggest
from potstill.stages.distill.config import DistillConfig
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.prune import PruneConfig
from potstill.stages.sequence import PREVIOUS_FOLDER, Stage

REQUIRED_DATA = "@data"  # in a recipe whose data the user has to give

DEFAULT_ORIGINS = {  # where the numbers come from that a recipe does not explain
    "learning_rate, warmup, final_rate, weight_decay, clip, context, batch_tokens": "ours, the defaults of distill",
    "temperature": "1, ours: logits are not divided",
    "on_policy": "0, ours: the student samples nothing",
    "lora, eval_every, patience": "0, ours: all weights are trained, without early stopping",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published method as a tuple of stages, with its source and the origin of each number.

    A key of `origins` may name several numbers, separated by commas; `DEFAULT_ORIGINS` explains all others. An option
    of an objective with the name of a training setting has the prefix `objective.`.
    """

    name: str
    summary: str
    source: str
    bibtex: str
    stages: tuple[Stage, ...]
    origins: dict[str, str]

    def override(
        self,
        *,
        teacher: str | None = None,
        student: str | None = None,
        data: str | None = None,
        tokens: int | None = None,
        seed: int = 1,
        device: str = "auto",
        dtype: str = "auto",
    ) -> "Recipe":
        """The same method with other models, data, budget, seed or device.

        A `student` replaces the share of the teacher. A recipe for fine-tuning has one model as teacher and student;
        either option then replaces both, unless both are given.

        Raises: UsageError if the recipe needs data and none is given, or if it has to prune its student itself.
        """
        if data is None and any(stage.data == REQUIRED_DATA for stage in self.stages):
            raise UsageError(
                f"{self.name} trains on prompts with responses or on chats; give --data, such as a .jsonl file of "
                f"`prompt` and `response`"
            )
        if student is not None and not any(_accepts_student(stage) for stage in self.stages):
            raise UsageError(
                f"{self.name} prunes its own student, so it takes no --student; name the model to prune with "
                f"--teacher, or choose another recipe"
            )
        overridden_stages = (_override_stage(stage, teacher, student, data, tokens, seed) for stage in self.stages)
        return replace(self, stages=tuple(replace(stage, device=device, dtype=dtype) for stage in overridden_stages))

    def shrink(self) -> "Recipe":
        """The same method on a budget of seconds; nothing else changes."""
        return replace(self, stages=tuple(_shrink_stage(stage) for stage in self.stages))

    @property
    def complete_origins(self) -> dict[str, str]:
        """`origins`, and `DEFAULT_ORIGINS` for the numbers that these do not explain."""
        explained_names = {name for names in self.origins for name in names.split(", ")}
        remaining_names = {
            names: [name for name in names.split(", ") if name not in explained_names] for names in DEFAULT_ORIGINS
        }
        return {
            **self.origins,
            **{
                ", ".join(remaining_names[names]): origin
                for names, origin in DEFAULT_ORIGINS.items()
                if remaining_names[names]
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "bibtex": self.bibtex,
            "stages": [stage.to_dict() for stage in self.stages],
            "origins": self.complete_origins,
        }


def list_recipes() -> list[Recipe]:
    """Every recipe, by name."""
    return [get_recipe(name) for name in list_recipe_names()]


def get_recipe(name: str, *, tiny: bool = False) -> Recipe:
    """The recipe called `name`, or its tiny form.

    Raises: NotFound with the names of all recipes.
    """
    if name not in list_recipe_names():
        names = list_recipe_names()
        raise NotFound(f"there is no recipe {name!r}{suggest(name, names)}; there are {', '.join(names)}")
    module = importlib.import_module(f"potstill.recipes.{name.replace('-', '_')}")
    full_recipe: Recipe = module.build_recipe()
    return full_recipe.shrink() if tiny else full_recipe


def list_recipe_names() -> list[str]:
    """The names of all recipes: the files of this package."""
    module_names = (module.name for module in pkgutil.iter_modules(potstill.recipes.__path__))
    return sorted(name.replace("_", "-") for name in module_names if name != "registry")


def _shrink_stage(stage: Stage) -> Stage:
    if isinstance(stage, PruneConfig):
        return replace(stage, calibration_tokens=256)
    if isinstance(stage, GenerateDatasetConfig):
        return replace(stage, documents=16)
    context = 512 if stage.data == PREVIOUS_FOLDER else 64  # answers of a model need room for their stop token
    settings = replace(
        stage.settings, tokens=1024, context=context, batch_tokens=max(context, 256), micro_tokens=max(context, 128)
    )
    return replace(stage, settings=settings, documents=4)


def _accepts_student(stage: Stage) -> bool:
    return isinstance(stage, DistillConfig) and stage.student != PREVIOUS_FOLDER


def _override_stage(
    stage: Stage, teacher: str | None, student: str | None, data: str | None, tokens: int | None, seed: int
) -> Stage:
    text: Any = stage.data if data is None or stage.data == PREVIOUS_FOLDER else data
    if isinstance(stage, PruneConfig | GenerateDatasetConfig):
        return replace(stage, model=stage.model if teacher is None else teacher, data=text, seed=seed)
    settings = replace(stage.settings, seed=seed, tokens=stage.settings.tokens if tokens is None else tokens)
    if stage.student == stage.teacher:  # fine-tuning: the teacher is the student
        teacher, student = teacher or student, student or teacher
    overrides: dict[str, Any] = {} if teacher is None else {"teacher": teacher}
    if student is not None and _accepts_student(stage):
        overrides |= {"student": student, "keep": None, "params": None}
    return replace(stage, data=text, settings=settings, **overrides)
