"""The arena: objectives against each other under equal conditions, each with several seeds; who is better is told."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from potstill.core import backend
from potstill.core.artefact import ARENA, recover, require_free, write_text
from potstill.core.errors import OutputExists, UnsupportedModel, UsageError
from potstill.data.wire import is_address
from potstill.evaluate.reading import require_context
from potstill.models.load import Loaded, load
from potstill.objectives.sides import Side, Sides
from potstill.pipeline.arm import Arm
from potstill.pipeline.bouts import Bout, continuable, free_memory, require_alike, settled_in, train, vacate
from potstill.pipeline.distill import Distill
from potstill.pipeline.measure import Measurement
from potstill.pipeline.pace import seconds_per_step
from potstill.pipeline.plan import Plan
from potstill.pipeline.prune import Prune
from potstill.pipeline.run import is_finished
from potstill.pipeline.stage import as_value, disk, note, require_apart, require_one_process
from potstill.pipeline.standings import publish
from potstill.pipeline.teachers import require_one
from potstill.pipeline.texts import Text, held_out_corpus

STUDENT = "student"  # the folder that every arm starts from, where it had to be pruned


@dataclass(frozen=True, kw_only=True)
class Arena:
    """Each of `objectives` with each of `seeds`, on the teacher, student, text and settings of `common`.

    The budget is one of `tokens`, the same for every arm, or `seconds` of training: an arm's steps are then what fits
    into these, at the pace that a few of its steps were measured to have; all seeds of an arm get the same steps.
    `prompts` are answered for ROUGE-L where the text asks something.
    """

    kind: ClassVar[str] = "arena"
    common: Distill
    objectives: tuple[str, ...]
    tokens: int | None = None
    seconds: float | None = None
    seeds: tuple[int, ...] = (1, 2, 3)
    prompts: int = 20

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.seconds is None):
            raise UsageError("a budget is needed, in tokens or in seconds: one of them")
        if min(self.tokens or 1, self.seconds or 1) <= 0:
            raise UsageError(f"the budget is {self.tokens or self.seconds}; it must be above 0")
        teacher = require_one(self.common.teacher, "an arena")
        if teacher is None or is_address(teacher) or self.common.teacher_cache is not None:
            raise UsageError("an arena measures beside its teacher, which has to be here; give --teacher, a model")
        if not self.objectives:
            raise UsageError("an arena needs an objective; give --objectives, such as cross_entropy,forward_kl")
        for what, given in (("arm", [arm.place for arm in self.arms]), ("seed", self.seeds)):
            if twice := [one for one in given if list(given).count(one) > 1]:
                raise UsageError(f"the {what} {twice[0]} is there twice; name each once")
        for arm in self.arms:
            if same := [one.name for one in self.arms if one is not arm and one.same(arm)]:
                raise UsageError(f"the arms {arm.name} and {same[0]} are one and the same; name it once")
        if self.seconds is not None and (writing := [arm.name for arm in self.arms if arm.policy.writes]):
            raise UsageError(
                f"how long the arm {writing[0]} takes depends on the student's answers; give a budget in tokens"
            )
        if not self.seeds or min(self.seeds) < 0:
            raise UsageError(f"the seeds are {list(self.seeds)}; at least one is needed, and none below 0")

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The contestants; building them refuses what is no objective."""
        return tuple(Arm.parse(text, self.common) for text in self.objectives)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return as_value(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True) -> dict[str, Any]:
        """Trains every arm into `out`/ARM-seedN, measures them all, and writes `arena.json`, README.md and a chart.

        With `resume` finished arms stay as they are; objectives and seeds may have been added.

        Raises:
            UsageError, NotFound, VocabularyMismatch, OutputExists: before anything is written.
            Interrupted, TrainingDiverged, ArtefactError: what is finished stays, and --resume goes on.
        """
        require_one_process()
        begun = self._require_room(out, overwrite=overwrite, resume=resume)
        self.require_fit()
        with disk(out), continuable(out):
            if overwrite:
                vacate(out)
            settled = begun or {"dtype": backend.name_of(self.common.compute_dtype(None)), "tokens": {}}
            common = dataclasses.replace(self.common, dtype=settled["dtype"])
            self._write(out, settled)
            student = started(common, out)
            self._settle(out, settled, common, student)
            bouts = [self._bout(out, arm, seed, settled, common, student) for seed in self.seeds for arm in self.arms]
            for number, bout in enumerate(bouts, 1):
                tokens = bout.stage.settings.tokens
                note(f"arm {number} of {len(bouts)}: {bout.arm}, seed {bout.seed}, {tokens:,} tokens")
                train(bout, show=show)
            require_alike(bouts)
            return self._publish(out, bouts, settled, common, student)

    def require_fit(self) -> None:
        """Refuse, before anything is trained, an objective or a context that is not for this teacher and student.

        Every arm's objective is built once, so that one which cannot be is refused too.

        Raises: VocabularyMismatch, UsageError, UnsupportedModel, NotFound.
        """
        teacher = self._load(str(self.common.teacher))
        student = teacher if self.common.student is None else self._load(self.common.student)
        require_context(self.common.settings.context, teacher.model, student.model)
        sides = Sides(Side(student.model, student.tokenizer), Side(teacher.model, teacher.tokenizer))
        asked = {(one.name, *one.options.items()): one for one in (arm.objective for arm in self.arms)}
        for objective in asked.values():
            objective.require(alike=sides.shared is not None)
            objective.build(sides if objective.alive else None)

    def tokens_of(self, arm: Arm, common: Distill, student: str) -> int:
        """The tokens that an arm trains on."""
        if self.seconds is None:
            assert self.tokens is not None
            return self.tokens
        settings = common.settings
        stage = arm.stage(common, student=student, tokens=settings.batch_tokens, seed=self.seeds[0])
        pace = seconds_per_step(stage)
        free_memory(common.device)
        steps = max(1, round(self.seconds / pace))
        note(f"{arm.name}: {pace:.2f} s a step, so {steps:,} steps in {self.seconds:,.0f} s")
        return steps * settings.packs_per_step * settings.context

    def forecast(self) -> dict[str, Any]:
        """What `run` would do, at the pace of a rough plan without steps; nothing is trained or written.

        An arm's seconds (or tokens, of a budget in seconds) are None for a family that no plan knows.
        """
        self.require_fit()
        paces: dict[str, float | None] = {}
        arms = []
        for arm in self.arms:
            brief = arm.stage(self.common, student=self.common.student, tokens=self.tokens or 1, seed=self.seeds[0])
            name = arm.objective.name if arm.objective.alive else str(arm.objective.teaches)
            if name not in paces:
                paces[name] = planned_pace(brief)
            pace, tokens, seconds = paces[name], self.tokens, self.seconds
            step = brief.settings.packs_per_step * brief.settings.context
            if pace is not None:
                tokens = step * max(1, round(seconds / pace)) if seconds is not None else tokens
                seconds = brief.settings.steps * pace if seconds is None else seconds
            arms.append({"arm": arm.name, "seeds": list(self.seeds), "tokens": tokens, "seconds": seconds})
        return {**self.to_dict(), "arms": arms}

    def _load(self, name: str) -> Loaded:
        common = self.common
        return load(name, allow_pickle=common.allow_pickle, trust_remote_code=common.trust_remote_code)

    def _require_room(self, out: Path, *, overwrite: bool, resume: bool) -> dict[str, Any] | None:
        """What an arena that is resumed had settled; refuses a folder that is not free, or another arena's."""
        if resume and overwrite:
            raise UsageError("--resume continues the arena in the folder and --overwrite discards it; give one of them")
        common, found = self.common, None
        require_apart(out, common.sole, common.student, common.data, common.eval_data)
        full = out.is_dir() and any(out.iterdir())
        if full and (overwrite or resume) and not (out / ARENA).is_file():
            raise OutputExists(f"{out} holds no arena, so it is neither resumed nor replaced; choose another --out")
        if full and resume:
            found = settled_in(out, self.to_dict())
        require_free(out, overwrite=overwrite or resume)
        return found

    def _settle(self, out: Path, settled: dict[str, Any], common: Distill, student: str) -> None:
        """Finds out the tokens of arms that have none yet, and writes down what every one gets."""
        for arm in self.arms:
            if arm.name not in settled["tokens"]:
                settled["tokens"][arm.name] = self.tokens_of(arm, common, student)
                self._write(out, settled)

    def _bout(self, out: Path, arm: Arm, seed: int, settled: Mapping[str, Any], common: Distill, student: str) -> Bout:
        stage = arm.stage(common, student=student, tokens=settled["tokens"][arm.name], seed=seed)
        return Bout(arm.name, seed, out / f"{arm.place}-seed{seed}", stage)

    def _write(self, out: Path, settled: Mapping[str, Any], **found: Any) -> dict[str, Any]:
        result = {"stage": self.to_dict(), "settled": dict(settled), **found}
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / ARENA, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return result

    def _publish(
        self, out: Path, bouts: Sequence[Bout], settled: Mapping[str, Any], common: Distill, student: str
    ) -> dict[str, Any]:
        """Measures the teacher, the student as it began and every arm on the same documents, and writes it all."""
        free_memory(common.device)
        text = Text(data=common.data, eval_data=common.eval_data, columns=common.columns)
        corpus = held_out_corpus(text)
        judged = Measurement(
            models=tuple(dict.fromkeys((str(common.teacher), student, *(str(bout.folder) for bout in bouts)))),
            teacher=common.sole,
            documents=common.documents,
            context=common.settings.context,
            prompts=self.prompts,
            speed=False,
            device=common.device,
            dtype=common.dtype,
            allow_pickle=common.allow_pickle,
            trust_remote_code=common.trust_remote_code,
        ).judge(corpus)
        baselines = {"teacher": judged[str(common.teacher)], "before training": judged[student]}
        found = publish(out, bouts, judged, baselines, budget=self.budget)
        data = {"name": corpus.name, "digest": corpus.digest, "documents": common.documents}
        return self._write(out, settled, data=data, **found)

    @property
    def budget(self) -> str:
        """The budget in words."""
        return f"{self.tokens:,} tokens" if self.tokens is not None else f"{self.seconds:,.0f} s of training"


def started(common: Distill, out: Path) -> str:
    """The folder of the student that every arm starts from: the one that is given, or one that is pruned here, once."""
    if common.student is not None:
        return common.student
    names = {field.name for field in dataclasses.fields(Prune)} & {field.name for field in dataclasses.fields(common)}
    shared = {name: getattr(common, name) for name in names}
    stage = Prune(model=str(common.teacher), seed=common.settings.seed, **shared)
    folder = out / STUDENT
    recover(folder)
    if not is_finished(folder, stage):
        note(f"pruning the student that all arms start from, into {folder}")
        stage.run(folder, overwrite=True)
        free_memory(common.device)
    return str(folder)


def planned_pace(stage: Distill) -> float | None:
    """Seconds of a step as `potstill plan --no-measure` says; None for a family that it does not know."""
    try:
        return float(Plan(distill=stage, measure=False).run()["time"]["seconds_per_step"])
    except UnsupportedModel:
        return None
