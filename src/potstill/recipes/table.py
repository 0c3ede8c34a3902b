"""Every recipe by name, and the value that a recipe is."""

import importlib
import pkgutil
from dataclasses import dataclass, replace
from typing import Any

import potstill.recipes
from potstill.core.errors import NotFound, UsageError
from potstill.pipeline.answers import Answers
from potstill.pipeline.distill import Distill
from potstill.pipeline.prune import Prune
from potstill.pipeline.run import PREVIOUS, Stage

NEEDED = "@data"  # in a recipe whose text only the user can name

HOUSE = {  # where what a recipe says nothing of comes from
    "learning_rate, warmup, final_rate, weight_decay, clip, context, batch_tokens": "ours, the defaults of distill",
    "temperature": "1, ours: logits as they are",
    "on_policy": "0, ours: all text is the data's",
    "lora, eval_every, patience": "0, ours: all weights are trained, and to the end",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published system as a tuple of stages, with its source and where each number comes from.

    A key of `origins` may name several numbers, with commas between them; `HOUSE` accounts for what it leaves out. An
    option of an objective that is called as a setting is has the prefix `objective.`.
    """

    name: str
    summary: str
    source: str
    bibtex: str
    stages: tuple[Stage, ...]
    origins: dict[str, str]

    def having(
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
        """The same method with other names, another budget, another seed or on another device.

        A `student` takes the place of a share of the teacher. What is fine-tuned is its own teacher, unless both are
        named.

        Raises: UsageError if the recipe has no data of its own and none is given, or has to make its student itself.
        """
        if data is None and any(stage.data == NEEDED for stage in self.stages):
            raise UsageError(
                f"{self.name} trains on prompts with responses or on chats, which only you can name; give --data, a "
                f".jsonl file of `prompt` and `response` say"
            )
        if student is not None and not any(_takes_student(stage) for stage in self.stages):
            raise UsageError(
                f"{self.name} trains what it has pruned itself, so it takes no --student; name the model to prune with "
                f"--teacher, or choose another recipe"
            )
        changed = (_changed(stage, teacher, student, data, tokens, seed) for stage in self.stages)
        return replace(self, stages=tuple(replace(stage, device=device, dtype=dtype) for stage in changed))

    def tiny(self) -> "Recipe":
        """The same method in seconds: no more than the budget is another."""
        return replace(self, stages=tuple(_tiny(stage) for stage in self.stages))

    @property
    def accounts(self) -> dict[str, str]:
        """`origins`, and those of the house for what else is inherited."""
        own = {name for names in self.origins for name in names.split(", ")}
        left = {names: [name for name in names.split(", ") if name not in own] for names in HOUSE}
        return {**self.origins, **{", ".join(left[names]): said for names, said in HOUSE.items() if left[names]}}

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "bibtex": self.bibtex,
            "stages": [stage.to_dict() for stage in self.stages],
            "origins": self.accounts,
        }


def recipes() -> list[Recipe]:
    """Every recipe, by name."""
    return [recipe(name) for name in names()]


def recipe(name: str, *, tiny: bool = False) -> Recipe:
    """The recipe called `name`, or its tiny form.

    Raises: NotFound with the names there are.
    """
    if name not in names():
        raise NotFound(f"there is no recipe {name!r}; there are {', '.join(names())}")
    module = importlib.import_module(f"potstill.recipes.{name.replace('-', '_')}")
    found: Recipe = module.full()
    return found.tiny() if tiny else found


def names() -> list[str]:
    """The names of all recipes: the files of this package."""
    found = (module.name for module in pkgutil.iter_modules(potstill.recipes.__path__))
    return sorted(name.replace("_", "-") for name in found if name != "table")


def _tiny(stage: Stage) -> Stage:
    if isinstance(stage, Prune):
        return replace(stage, calibration_tokens=256)
    if isinstance(stage, Answers):
        return replace(stage, documents=16)
    settings = replace(stage.settings, tokens=1024, context=64, batch_tokens=256, micro_tokens=128)
    return replace(stage, settings=settings, documents=4)


def _takes_student(stage: Stage) -> bool:
    return isinstance(stage, Distill) and stage.student != PREVIOUS


def _changed(
    stage: Stage, teacher: str | None, student: str | None, data: str | None, tokens: int | None, seed: int
) -> Stage:
    data = stage.data if data is None or stage.data == PREVIOUS else data
    if isinstance(stage, Prune | Answers):
        return replace(stage, model=stage.model if teacher is None else teacher, data=data, seed=seed)
    settings = replace(stage.settings, seed=seed, tokens=stage.settings.tokens if tokens is None else tokens)
    if stage.student == stage.teacher:  # fine-tuned: the same model, both times
        teacher, student = teacher or student, student or teacher
    named: dict[str, Any] = {} if teacher is None else {"teacher": teacher}
    if student is not None and _takes_student(stage):
        named |= {"student": student, "keep": None, "params": None}
    return replace(stage, data=data, settings=settings, **named)
