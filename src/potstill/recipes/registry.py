"""The class of a recipe, and every recipe by name."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from potstill.core.errors import NotFound, UsageError
from potstill.core.suggestions import suggest
from potstill.recipes.listing import list_recipe_names
from potstill.stages.align.config import AlignConfig
from potstill.stages.candidates.config import CandidatesConfig
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
REQUIRED_PARALLEL, REQUIRED_QUESTIONS = "@parallel", "@questions"
OPTIONAL_PREFERENCES = "@preferences?"  # a stage that reads these is left out without them
SOURCES = {
    REQUIRED_QUESTIONS: "questions",
    OPTIONAL_PREFERENCES: "preferences",
}  # the option that gives what is no --data
DATA_HINTS = {
    REQUIRED_DATA: "prompts with responses, or chats; give --data, such as a .jsonl file of `prompt` and `response`",
    REQUIRED_TEXTS: "long texts; give --data, such as a folder of books",
    REQUIRED_CHATS: "instructions and conversations; give --data twice, or one of them, such as two .jsonl files",
    REQUIRED_PREFERENCES: "preferences; give --data, such as a .jsonl file of `prompt`, `chosen` and `rejected`",
    REQUIRED_FACTS: "facts; give --data, such as a .jsonl file of `subject`, `prompt`, `target` and `language`",
    REQUIRED_LANGUAGES: "texts of several languages; give --data, such as a .jsonl file of `text` and `language`",
    REQUIRED_PARALLEL: "prompts in several languages; give --data, such as a .jsonl file of `id`, `language` and "
    "`prompt`",
    REQUIRED_QUESTIONS: "questions; give --questions, such as a .jsonl file of `prompt`, `answer`, `language` and "
    "`english`",
}
JUDGED_REWARD = "m_thinker"  # of whose stages --judge is an option
Source = str | tuple[str, ...]

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
    "prompts_per_step": "0, ours: --batch-tokens divided by --context; only grpo has prompts",
}
CANDIDATE_ORIGINS = {  # and of a stage of `generate --select`
    "top_p": "1, ours: samples of the whole distribution",
    "per_language": "0, ours: all prompts",
}
TINY_PROMPTS, TINY_PER_LANGUAGE, TINY_TOKENS = 16, 4, 32  # of a selection, of what it keeps, and of an answer


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
        data: Source | None = None,
        preferences: Source | None = None,
        questions: Source | None = None,
        judge: str | None = None,
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
        `preferences` and `questions` are what a stage reads beside `data`, and `judge` is a served model that scores
        the thinking of answers. A stage of optional `preferences` is left out without them.

        Raises: UsageError if the recipe needs data and none is given, or for an option that it does not take.
        """
        sources = {OPTIONAL_PREFERENCES: preferences, REQUIRED_QUESTIONS: questions}
        self._check_sources(data, sources, judge)
        remaining_stages = [s for s in self.stages if s.data != OPTIONAL_PREFERENCES or preferences is not None]
        self._check_models(remaining_stages[-1], student, draft_vocabulary)
        length = {name: value for name, value in (("tokens", tokens), ("epochs", epochs)) if value is not None}
        if length and not self._is_trained:
            raise UsageError(f"{self.name} trains nothing, so it takes no --{next(iter(length))}; omit it")
        replacements = {name: source for name, source in sources.items() if source is not None}
        stages: list[Stage] = []
        for stage in remaining_stages:
            stage = _override_stage(_fill_data(stage, data, replacements), teacher, student, length, seed)
            stages.append(replace(_add_judge(stage, judge), device=device, dtype=dtype))
        if isinstance(stages[-1], DistillConfig):
            stages[-1] = replace(stages[-1], draft_vocabulary=draft_vocabulary)
        return replace(self, stages=tuple(stages))

    def _check_sources(self, data: Source | None, sources: Mapping[str, Source | None], judge: str | None) -> None:
        """Refuse a recipe without data that it needs, and data or a judge that it does not read.

        Raises: UsageError.
        """
        names = [str(stage.data) for stage in self.stages]
        for name in names:
            if name in DATA_HINTS and (sources[name] if name in SOURCES else data) is None:
                raise UsageError(f"{self.name} reads {DATA_HINTS[name]}")
        options = [SOURCES[name] for name, source in sources.items() if source is not None and name not in names]
        options += ["judge"] if judge is not None and not any(map(_is_judged, self.stages)) else []
        if options:
            raise UsageError(f"{self.name} takes no --{options[0]}; omit it")

    def _check_models(self, last_stage: Stage, student: str | None, draft_vocabulary: int | None) -> None:
        """Refuse a student or a draft vocabulary that no stage takes. Raises: UsageError."""
        if draft_vocabulary is not None and not isinstance(last_stage, DistillConfig):
            raise UsageError(f"{self.name} ends in no distillation, so it takes no --draft-vocabulary; omit it")
        if student is not None and not isinstance(last_stage, DistillConfig | AlignConfig):
            raise UsageError(f"{self.name} trains no model of its own, so it takes no --student; omit it")
        if student is not None and not any(_accepts_student(stage) for stage in self.stages):
            raise UsageError(
                f"{self.name} makes its own student, so it takes no --student; name the model that it starts from "
                f"with --teacher, or choose another recipe"
            )

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
        defaults = {**DEFAULT_ORIGINS}
        for kind, origins in ((AlignConfig, ALIGN_ORIGINS), (CandidatesConfig, CANDIDATE_ORIGINS)):
            defaults |= origins if any(isinstance(stage, kind) for stage in self.stages) else {}
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
    if isinstance(stage, CandidatesConfig):
        per_language = min(TINY_PER_LANGUAGE, stage.per_language)
        return replace(stage, documents=TINY_PROMPTS, max_tokens=TINY_TOKENS, per_language=per_language)
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
    if isinstance(stage, AlignConfig) and stage.loss.data == "prompts":
        return replace(stage, settings=settings, max_tokens=TINY_TOKENS, documents=4)
    return replace(stage, settings=settings, documents=4)


def _accepts_student(stage: Stage) -> bool:
    return isinstance(stage, DistillConfig) and not is_stage_folder(stage.student)


def _is_judged(stage: Stage) -> bool:
    return isinstance(stage, AlignConfig) and stage.reward == JUDGED_REWARD


def _add_judge(stage: Stage, judge: str | None) -> Stage:
    """`stage` with a judge of its reward."""
    if judge is None or not isinstance(stage, AlignConfig) or not _is_judged(stage):
        return stage
    return replace(stage, reward=f"{JUDGED_REWARD}:judge={judge}")


def _fill_data(stage: Stage, data: Source | None, sources: Mapping[str, Source]) -> Stage:
    """`stage` with the user's data in the place of the recipe's; the folders of earlier stages stay."""

    def fill(name: Source) -> Source:
        if isinstance(name, str) and name in sources:
            return sources[name]
        return name if data is None or is_stage_folder(name) else data

    if isinstance(stage, EditConfig):
        return replace(stage, facts=fill(stage.data))
    if not isinstance(stage, CandidatesConfig):
        return replace(stage, data=fill(stage.data))
    parts = [fill(name) for name in stage.exclude]
    exclude = tuple(name for part in parts for name in ((part,) if isinstance(part, str) else part))
    return replace(stage, data=fill(stage.data), exclude=exclude)


def _override_stage(
    stage: Stage, teacher: str | None, student: str | None, length: Mapping[str, Any], seed: int
) -> Stage:
    if isinstance(stage, EditConfig):
        return replace(stage, model=teacher or stage.model, seed=seed)
    models: dict[str, Any] = {}
    if not isinstance(stage, DistillConfig) and teacher is not None and not is_stage_folder(stage.model):
        models["model"] = teacher
    if not isinstance(stage, DistillConfig | MedusaConfig | AlignConfig):
        return replace(stage, seed=seed, **models)
    budget = {"tokens": None, "epochs": None, **length} if length else {}
    settings: Any = replace(stage.settings, seed=seed, **budget)
    if not isinstance(stage, DistillConfig):
        return replace(stage, settings=settings, **models)
    if stage.student == stage.teacher:  # fine-tuning: the teacher is the student
        teacher, student = teacher or student, student or teacher
    models = {} if teacher is None else {"teacher": teacher}
    if student is not None and _accepts_student(stage):
        models |= {"student": student, "keep": None, "params": None}
    return replace(stage, settings=settings, **models)
