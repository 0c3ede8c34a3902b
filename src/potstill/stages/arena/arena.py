"""The arena: train objectives under equal conditions with several seeds, and report which is better."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.atomic_files import ARENA_FILE, recover_folder, write_text
from potstill.core.device import get_dtype_name
from potstill.core.errors import OutputExists, UnsupportedModel, UsageError
from potstill.evaluate.scoring_windows import check_context
from potstill.objectives.model_info import ModelInfo, PairInfo
from potstill.stages.arena.arm import Arm
from potstill.stages.arena.report import publish
from potstill.stages.arena.runs import (
    ArenaRun,
    check_same_origins,
    clear_arena_folder,
    explain_arena_interrupt,
    free_memory,
    read_arena_state,
    train_run,
)
from potstill.stages.console import explain_write_errors, print_note
from potstill.stages.dataset import load_held_out_corpus
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.ensemble import TeacherSource
from potstill.stages.distill.models import open_caches
from potstill.stages.distill.timing import measure_seconds_per_step
from potstill.stages.measure import MeasureConfig
from potstill.stages.option_checks import check_single_process
from potstill.stages.options import ArenaOptions
from potstill.stages.plan.plan import Plan
from potstill.stages.prune import PruneConfig
from potstill.stages.run_folder import reserve_output
from potstill.stages.run_models import choose_dtype, load_run_model
from potstill.stages.sequence import is_finished
from potstill.stages.stage import to_plain_dict
from potstill.stages.text_options import get_text_options

STUDENT_FOLDER = "student"  # holds the pruned student that every arm starts from


@dataclass(frozen=True, kw_only=True)
class Arena(ArenaOptions):
    """Train each of `objectives` with each of `seeds`, on the teachers, student, text and settings of `common`.

    The budget is `tokens` or `epochs`, the same for every arm, or `seconds` of training. With seconds, the arena
    measures a few steps to compute how many fit; all seeds of an arm get the same steps. `prompts` is the number of
    prompts for ROUGE-L, on data with prompts. The first teacher is measured.
    """

    kind: ClassVar[str] = "arena"
    common: DistillConfig

    def __post_init__(self) -> None:
        budgets = [budget for budget in (self.tokens, self.epochs, self.seconds) if budget is not None]
        if len(budgets) != 1:
            raise UsageError("an arena needs one budget, in tokens, in epochs or in seconds")
        if budgets[0] <= 0:
            raise UsageError(f"the budget is {budgets[0]}; it must be above 0")
        if self.teacher.kind != "local" or self.common.teacher_cache is not None:
            raise UsageError("an arena measures its first teacher; give a local model as --teacher")
        if not self.objectives:
            raise UsageError("an arena needs an objective; give --objectives, such as cross_entropy,forward_kl")
        for label, candidates in (("arm", [arm.folder_name for arm in self.arms]), ("seed", self.seeds)):
            if duplicates := [candidate for candidate in candidates if list(candidates).count(candidate) > 1]:
                raise UsageError(f"the {label} {duplicates[0]} is given twice; give each once")
        for arm in self.arms:  # the config of each arm refuses an objective that does not fit the teachers
            self._make_planned_stage(arm, self.common.settings.seed)
        for arm in self.arms:
            if equivalents := [
                candidate.name for candidate in self.arms if candidate is not arm and candidate.is_equivalent(arm)
            ]:
                raise UsageError(f"the arms {arm.name} and {equivalents[0]} are the same; give one of them")
        if self.seconds is not None and (rollout_arms := [arm.name for arm in self.arms if arm.rollout.is_enabled]):
            raise UsageError(
                f"how long the arm {rollout_arms[0]} takes depends on the student's answers; give a budget in tokens"
            )
        if not self.seeds or min(self.seeds) < 0:
            raise UsageError(f"the seeds are {list(self.seeds)}; at least one is needed, and none below 0")

    @property
    def teacher(self) -> TeacherSource:
        """The first teacher, which is measured, and pruned where no student is given."""
        return self.common.teachers[0]

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The arms; building them refuses an unknown objective."""
        return tuple(Arm.parse(text, self.common) for text in self.objectives)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True) -> dict[str, Any]:
        """Train every arm into `out`/ARM-seedN, measure them all, and write `arena.json`, README.md and a chart.

        With `resume` finished arms stay; objectives and seeds may be added.

        Raises:
            UsageError, NotFound, VocabularyMismatch, OutputExists: before anything is written.
            Interrupted, TrainingDiverged, ArtifactError: finished arms stay, and --resume continues.
        """
        check_single_process()
        inputs = self.common.inputs
        with reserve_output(out, inputs, overwrite=overwrite, resume=resume, resumable=(ARENA_FILE,)):
            return self._run(out, overwrite=overwrite, resume=resume, show=show)

    def _run(self, out: Path, *, overwrite: bool, resume: bool, show: bool) -> dict[str, Any]:
        saved_state = self._read_state(out, overwrite=overwrite, resume=resume)
        self.check_compatibility()
        with explain_write_errors(out), explain_arena_interrupt(out):
            if overwrite:
                clear_arena_folder(out)
            state = saved_state or {
                "dtype": get_dtype_name(choose_dtype(self.common, open_caches(self.common))),
                "tokens": {},
            }
            common = dataclasses.replace(self.common, dtype=state["dtype"])
            self._write_results(out, state)
            student = prepare_student(common, out)
            self._assign_tokens(out, state, common, student)
            runs = [self._make_run(out, arm, seed, state, common, student) for seed in self.seeds for arm in self.arms]
            for index, arena_run in enumerate(runs, 1):
                tokens = arena_run.stage.settings.tokens
                length = self.budget_text if tokens is None else f"{tokens:,} tokens"
                print_note(f"arm {index} of {len(runs)}: {arena_run.arm}, seed {arena_run.seed}, {length}")
                train_run(arena_run, show=show)
            check_same_origins(runs)
            return self._publish(out, runs, state, common, student)

    def check_compatibility(self) -> None:
        """Refuse an objective or a context that does not fit this teacher and student, before anything is trained.

        Each arm's objective is built once, which refuses those that cannot be built.

        Raises: VocabularyMismatch, UsageError, UnsupportedModel, NotFound.
        """
        teacher = load_run_model(self.common, str(self.teacher.location))
        student = teacher if self.common.student is None else load_run_model(self.common, self.common.student)
        check_context(self.common.settings.context, teacher.model, student.model)
        pair_info = PairInfo(ModelInfo(student.model, student.tokenizer), ModelInfo(teacher.model, teacher.tokenizer))
        objectives = {(config.name, *config.options.items()): config for config in (arm.objective for arm in self.arms)}
        for objective in objectives.values():
            objective.check_tokenizers(same_tokenizer=pair_info.num_shared_ids is not None)
            objective.build(pair_info if objective.needs_teacher_model else None, self.common.teacher_options.ensemble)

    def count_tokens(self, arm: Arm, common: DistillConfig, student: str) -> int | None:
        """The number of tokens that an arm trains on; None where its text says that, by epochs."""
        if self.seconds is None:
            return self.tokens
        settings = common.settings
        stage = arm.make_stage(common, student=student, tokens=settings.batch_tokens, seed=self.seeds[0])
        step_seconds = measure_seconds_per_step(stage)
        free_memory(common.device)
        steps = max(1, round(self.seconds / step_seconds))
        print_note(f"{arm.name}: {step_seconds:.2f} s a step, so {steps:,} steps in {self.seconds:,.0f} s")
        return steps * settings.packs_per_step * settings.context

    def estimate(self) -> dict[str, Any]:
        """The runs of the arena with rough estimates from a plan without measured steps; this trains and writes
        nothing.

        The seconds of an arm (or its tokens, with a budget in seconds) are None for a model family that `plan` refuses.
        """
        self.check_compatibility()
        times: dict[str, Mapping[str, Any] | None] = {}
        arms = []
        for arm in self.arms:
            stage = self._make_planned_stage(arm, self.seeds[0])
            cost_key = arm.objective.name if arm.objective.needs_teacher_model else str(arm.objective.uses_teacher)
            if cost_key not in times:
                times[cost_key] = estimate_time(stage)
            time, tokens, seconds = times[cost_key], self.tokens, self.seconds
            if time is not None:
                steps = time["steps"] if seconds is None else max(1, round(seconds / time["seconds_per_step"]))
                step_tokens = stage.settings.packs_per_step * stage.settings.context
                tokens = steps * step_tokens if tokens is None else tokens
                seconds = steps * time["seconds_per_step"] if seconds is None else seconds
            arms.append({"arm": arm.name, "seeds": list(self.seeds), "tokens": tokens, "seconds": seconds})
        return {**self.to_dict(), "arms": arms}

    def _make_planned_stage(self, arm: Arm, seed: int) -> DistillConfig:
        """The config of an arm before its student is pruned, and before seconds become tokens."""
        tokens = 1 if self.seconds is not None else self.tokens
        return arm.make_stage(self.common, student=self.common.student, tokens=tokens, epochs=self.epochs, seed=seed)

    def _read_state(self, out: Path, *, overwrite: bool, resume: bool) -> dict[str, Any] | None:
        """The state of the arena that is resumed. Refuses to replace other files, and to resume another arena."""
        has_files = out.is_dir() and any(out.iterdir())
        if has_files and overwrite and not (out / ARENA_FILE).is_file():
            raise OutputExists(f"{out} contains no arena, so potstill does not replace it; choose another --out")
        return read_arena_state(out, self.to_dict()) if has_files and resume else None

    def _assign_tokens(self, out: Path, state: dict[str, Any], common: DistillConfig, student: str) -> None:
        """Choose the tokens of arms that have none yet, and save them."""
        for arm in self.arms:
            if arm.name not in state["tokens"]:
                state["tokens"][arm.name] = self.count_tokens(arm, common, student)
                self._write_results(out, state)

    def _make_run(
        self, out: Path, arm: Arm, seed: int, state: Mapping[str, Any], common: DistillConfig, student: str
    ) -> ArenaRun:
        tokens = state["tokens"][arm.name]
        stage = arm.make_stage(common, student=student, tokens=tokens, epochs=self.epochs, seed=seed)
        return ArenaRun(arm.name, seed, out / f"{arm.folder_name}-seed{seed}", stage)

    def _write_results(self, out: Path, state: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
        result = {"stage": self.to_dict(), "settled": dict(state), **sections}
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ARENA_FILE, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return result

    def _publish(
        self, out: Path, runs: Sequence[ArenaRun], state: Mapping[str, Any], common: DistillConfig, student: str
    ) -> dict[str, Any]:
        """Measure the teacher, the untrained student and every arm on the same documents, and write the report."""
        free_memory(common.device)
        teacher = str(self.teacher.location)
        dataset_config = DatasetConfig(
            **get_text_options(common), data=common.data, eval_data=common.eval_data, columns=common.columns
        )
        corpus = load_held_out_corpus(dataset_config)
        results = MeasureConfig(
            **get_text_options(common),
            models=tuple(dict.fromkeys((teacher, student, *(str(arena_run.folder) for arena_run in runs)))),
            teacher=teacher,
            documents=common.documents,
            context=common.settings.context,
            prompts=self.prompts,
            speed=False,
            device=common.device,
            dtype=common.dtype,
            allow_pickle=common.allow_pickle,
            trust_remote_code=common.trust_remote_code,
        ).evaluate_models(corpus)
        baselines = {"teacher": results[teacher], "before training": results[student]}
        summary = publish(out, runs, results, baselines, budget=self.budget_text)
        data = {"name": corpus.name, "digest": corpus.digest, "documents": common.documents}
        return self._write_results(out, state, data=data, **summary)

    @property
    def budget_text(self) -> str:
        """The budget in words."""
        if self.epochs is not None:
            return f"{self.epochs:g} epochs"
        return f"{self.tokens:,} tokens" if self.tokens is not None else f"{self.seconds:,.0f} s of training"


def prepare_student(common: DistillConfig, out: Path) -> str:
    """The folder of the student that every arm starts from: the given one, or one pruned here once."""
    if common.student is not None:
        return common.student
    field_names = {field.name for field in dataclasses.fields(PruneConfig)} & {
        field.name for field in dataclasses.fields(common)
    }
    options = {name: getattr(common, name) for name in field_names}
    stage = PruneConfig(model=str(common.teachers[0].location), seed=common.settings.seed, **options)
    folder = out / STUDENT_FOLDER
    recover_folder(folder)
    if not is_finished(folder, stage):
        print_note(f"pruning the student that all arms start from, into {folder}")
        stage.run(folder, overwrite=True)
        free_memory(common.device)
    return str(folder)


def estimate_time(stage: DistillConfig) -> Mapping[str, Any] | None:
    """Steps and seconds by `potstill plan --no-measure`; None for a model family that it refuses."""
    try:
        time: Mapping[str, Any] = Plan(distill=stage, measure=False).run()["time"]
        return time
    except UnsupportedModel:
        return None
