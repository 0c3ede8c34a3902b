"""The class of a recipe, and every recipe by name."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from potstill.core.errors import NotFound, UsageError
from potstill.core.suggestions import suggest
from potstill.recipes.listing import list_recipe_names
from potstill.stages.align.config import AlignConfig
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.edit import EditConfig
from potstill.stages.generate_dataset import GenerateDatasetConfig
from potstill.stages.medusa.config import MedusaConfig
from potstill.stages.prune import PruneConfig
from potstill.stages.sequence import Stage, is_stage_folder
from potstill.stages.skip_layers import SkipLayersConfig
from potstill.stages.spec_game import SpecGameConfig

REQUIRED_DATA, REQUIRED_TEXTS, REQUIRED_LANGUAGES = "@data", "@texts", "@languages"  # data that the user has to give
REQUIRED_CHATS, REQUIRED_PREFERENCES, REQUIRED_FACTS = "@chats", "@preferences", "@facts"
DATA_HINTS = {
    REQUIRED_DATA: "prompts with responses, or chats; give --data, such as a .jsonl file of `prompt` and `response`",
    REQUIRED_TEXTS: "long texts; give --data, such as a folder of books",
    REQUIRED_CHATS: "instructions and conversations; give --data twice, or one of them, such as two .jsonl files",
    REQUIRED_PREFERENCES: "preferences; give --data, such as a .jsonl file of `prompt`, `chosen` and `rejected`",
    REQUIRED_FACTS: "facts; give --data, such as a .jsonl file of `subject`, `prompt`, `target` and `language`",
    REQUIRED_LANGUAGES: "texts of several languages; give --data, such as a .jsonl file of `text` and `language`",
}

DEFAULT_ORIGINS = {  # where the numbers come from that a recipe does not explain
    "learning_rate, warmup, final_rate, weight_decay, clip, context, batch_tokens": "ours, the defaults of distill",
    "temperature": "1, ours: logits are not divided",
    "on_policy": "0, ours: the student samples nothing",
    "neftune": "0, ours: no noise on the embeddings",
    "min_document_tokens, short_share": "0, ours: documents of all lengths are trained on",
    "lora, eval_every, patience": "0, ours: all weights are trained, without early stopping",
}


ALIGN_ORIGINS = {  # the same for the numbers of a stage of `align`
    "samples, max_tokens": "8 and 64, ours: only grpo samples answers",
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
        data: str | tuple[str, ...] | None = None,
        tokens: int | None = None,
        epochs: float | None = None,
        draft_vocabulary: int | None = None,
        seed: int = 1,
        device: str = "auto",
        dtype: str = "auto",
    ) -> "Recipe":
        """The same method with other models, data, budget, seed or device.

        A `student` replaces the share of the teacher. A recipe for fine-tuning has one model as teacher and student;
        either option then replaces both, unless both are given. The last stage takes `draft_vocabulary`.

        Raises: UsageError if the recipe needs data and none is given, or for an option that it does not take.
        """
        if data is None and (hints := [DATA_HINTS[str(s.data)] for s in self.stages if str(s.data) in DATA_HINTS]):
            raise UsageError(f"{self.name} reads {hints[0]}")
        is_aligned = isinstance(self.stages[-1], AlignConfig)
        for flag, value in (("--student", None if is_aligned else student), ("--draft-vocabulary", draft_vocabulary)):
            if value is not None and not isinstance(self.stages[-1], DistillConfig):
                raise UsageError(f"{self.name} trains no model of its own, so it takes no {flag}; omit it")
        if student is not None and not any(_accepts_student(stage) for stage in self.stages):
            raise UsageError(
                f"{self.name} makes its own student, so it takes no --student; name the model that it starts from "
                f"with --teacher, or choose another recipe"
            )
        length = {name: value for name, value in (("tokens", tokens), ("epochs", epochs)) if value is not None}
        if length and not self._is_trained:
            raise UsageError(f"{self.name} trains nothing, so it takes no --{next(iter(length))}; omit it")
        overridden_stages = (_override_stage(stage, teacher, student, data, length, seed) for stage in self.stages)
        stages: list[Stage] = [replace(stage, device=device, dtype=dtype) for stage in overridden_stages]
        if isinstance(stages[-1], DistillConfig):
            stages[-1] = replace(stages[-1], draft_vocabulary=draft_vocabulary)
        return replace(self, stages=tuple(stages))

    def shrink(self) -> "Recipe":
        """The same method on a budget of seconds; nothing else changes."""
        return replace(self, stages=tuple(_shrink_stage(stage) for stage in self.stages))

    @property
    def _is_trained(self) -> bool:
        return any(isinstance(stage, DistillConfig | AlignConfig | MedusaConfig) for stage in self.stages)

    @property
    def complete_origins(self) -> dict[str, str]:
        """`origins`, and where a stage trains, `DEFAULT_ORIGINS` for the numbers that these do not explain."""
        if not self._is_trained:
            return self.origins
        has_alignment = any(isinstance(stage, AlignConfig) for stage in self.stages)
        defaults = {**DEFAULT_ORIGINS, **(ALIGN_ORIGINS if has_alignment else {})}
        explained_names = {name for names in self.origins for name in names.split(", ")}
        remaining_names = {
            names: [name for name in names.split(", ") if name not in explained_names] for names in defaults
        }
        return {
            **self.origins,
            **{
                ", ".join(remaining_names[names]): origin
                for names, origin in defaults.items()
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


def _shrink_stage(stage: Stage) -> Stage:
    if isinstance(stage, PruneConfig | ConvertConfig):
        return replace(stage, calibration_tokens=256)
    if isinstance(stage, GenerateDatasetConfig):
        return replace(stage, documents=16)
    if isinstance(stage, SkipLayersConfig):
        return replace(stage, documents=2, max_evaluations=6)
    if isinstance(stage, SpecGameConfig):
        return replace(stage, documents=2, max_tokens=8)
    if isinstance(stage, EditConfig):
        return replace(stage, limit=1, steps=2, paraphrases=1, max_tokens=8)
    has_answers = is_stage_folder(stage.data) or isinstance(stage, AlignConfig)
    context = 512 if has_answers else 64  # answers of a model, or two answers to a prompt, need room
    settings: Any = replace(
        stage.settings,
        tokens=1024,
        epochs=None,
        context=context,
        batch_tokens=max(context, 256),
        micro_tokens=max(context, 128),
    )
    if isinstance(stage, DistillConfig):
        stage = replace(stage, min_document_tokens=min(8, stage.min_document_tokens))
    return replace(stage, settings=settings, documents=4)


def _accepts_student(stage: Stage) -> bool:
    return isinstance(stage, DistillConfig) and not is_stage_folder(stage.student)


def _override_stage(
    stage: Stage,
    teacher: str | None,
    student: str | None,
    data: str | tuple[str, ...] | None,
    length: Mapping[str, Any],
    seed: int,
) -> Stage:
    text: Any = stage.data if data is None or is_stage_folder(stage.data) else data
    if isinstance(stage, EditConfig):
        return replace(stage, model=teacher or stage.model, facts=text, seed=seed)
    if isinstance(stage, PruneConfig | ConvertConfig | GenerateDatasetConfig | SkipLayersConfig | SpecGameConfig):
        model = stage.model if teacher is None or is_stage_folder(stage.model) else teacher
        return replace(stage, model=model, data=text, seed=seed)
    budget = {"tokens": None, "epochs": None, **length} if length else {}
    settings: Any = replace(stage.settings, seed=seed, **budget)
    if isinstance(stage, MedusaConfig | AlignConfig):
        model = stage.model if teacher is None or is_stage_folder(stage.model) else teacher
        return replace(stage, model=model, data=text, settings=settings)
    if stage.student == stage.teacher:  # fine-tuning: the teacher is the student
        teacher, student = teacher or student, student or teacher
    overrides: dict[str, Any] = {} if teacher is None else {"teacher": teacher}
    if student is not None and _accepts_student(stage):
        overrides |= {"student": student, "keep": None, "params": None}
    return replace(stage, data=text, settings=settings, **overrides)
