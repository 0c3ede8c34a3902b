"""Distil: a teacher, a student (or a budget) and text in; a measured student in a stock folder out."""

import contextlib
import dataclasses
import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from potstill.core import backend
from potstill.core.artefact import TRAINING, Card, recover, require_free, writing
from potstill.core.errors import (
    ArtefactError,
    DataError,
    MissingDependency,
    NotFound,
    OutputExists,
    UsageError,
    VocabularyMismatch,
)
from potstill.core.types import Companion, Measure, Objective
from potstill.data.cache import Cache, Recalled, faults
from potstill.data.served import TOP_K
from potstill.data.turns import Marks
from potstill.data.wire import is_address
from potstill.evaluate.plots import draw_curve
from potstill.evaluate.reading import Reading
from potstill.evaluate.rouge import Writing
from potstill.evaluate.samples import side_by_side, to_markdown
from potstill.models.load import Loaded, load
from potstill.models.signals import known_head
from potstill.models.vocabulary import real_ids, shared_ids
from potstill.objectives.named import Mixture
from potstill.pipeline.absent import Absent, leaving, require_bounded, require_kept, require_teacher
from potstill.pipeline.beside import BEFORE, before_training, beside_teacher
from potstill.pipeline.capture import teacher_facts, tokenizer_facts
from potstill.pipeline.card import write_card
from potstill.pipeline.crossing import examine_across
from potstill.pipeline.doctor import require_sound
from potstill.pipeline.examination import NOTE, examine
from potstill.pipeline.forecast import announce
from potstill.pipeline.invariants import QUICK
from potstill.pipeline.pair import Pair, models_of, packed, require_known
from potstill.pipeline.prune import Prune, reload_gap, save
from potstill.pipeline.rollouts import UNCOUNTED, require_answers, rollout_of
from potstill.pipeline.stage import (
    as_value,
    command,
    disk,
    essence,
    note,
    parent,
    require_apart,
    require_choice,
    require_size,
    require_strategy,
    waiting,
)
from potstill.pipeline.teachers import (
    AVERAGE,
    Several,
    alone,
    live_teachers,
    of_teacher,
    pair_of,
    require_sure,
)
from potstill.pipeline.texts import Prepared, Text, prepare
from potstill.pipeline.workplace import COMPUTE, resumable, workplace
from potstill.pipeline.worlds import crossing_of, world_of
from potstill.train import adapters, ranks
from potstill.train.blocks import require_checkpointing
from potstill.train.policy import GKD, Policy
from potstill.train.progress import METRICS
from potstill.train.run import Outcome, identify, train
from potstill.train.settings import Settings
from potstill.train.study import Study
from potstill.transforms.fit import AUTO

PROMPTS = ("What is a pot still?", "Write one sentence about the sea.", "How do I read a file in Python?")
BASELINE = "before.json"  # the measures of the student when it began
CURVE = "curve.png"
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a stage returns to Python: the live model and its tokenizer, the card, and the measures by model name."""

    out: Path
    card: Card
    model: PreTrainedModel
    tokenizer: Any
    measures: Mapping[str, Sequence[Measure]]

    def to_dict(self) -> dict[str, Any]:
        """The folder and its card, for JSON."""
        return {"out": str(self.out), **self.card.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Trains `student` (or the teacher cut to `keep` or `params`) on `data` under `objective`.

    The teacher's weights need not be here if a student is given: `teacher` may be the address of a server, which is
    asked for the `top_k` likeliest tokens, or be left out (or not be found) where `teacher_cache` holds what it said.
    It may also be several (`pipeline.teachers`), caches among them, that teach together as `combine` says.

    `on_policy` is the share of the documents whose completions the student itself writes in training; they are compared
    with the teacher, and are no truth for cross-entropy. `rollout` says how they are chosen (`train.policy`).

    The default objective is 0.7 cross-entropy + 0.3 forward KL; `objective="cross_entropy"` needs no teacher, which
    then only measures. The output folder appears whole; while training it holds `training/` alone.
    """

    kind: ClassVar[str] = "distill"
    teacher: str | tuple[str, ...] | None = None
    combine: str = AVERAGE
    student: str | None = None
    keep: float | None = None
    params: int | None = None
    strategy: str = AUTO
    data: str = "stdlib"
    columns: str = ""
    eval_data: str | None = None
    teacher_cache: str | None = None
    top_k: int = TOP_K
    objective: Mixture = field(default_factory=Mixture)
    settings: Settings = field(default_factory=Settings)
    lora: int = 0
    on_policy: float = 0.0
    rollout: str = GKD
    device: str = "auto"
    dtype: str = "auto"
    documents: int = 100
    skip_doctor: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require_size({"student": self.student, "keep": self.keep, "params": self.params})
        require_strategy(self.strategy)
        if self.several is None:
            self._require_taught()
        else:
            _ = self.alone  # each of several is checked as if it taught alone
        if self.top_k != TOP_K and not any(map(is_address, self.sources)):
            raise UsageError(
                "--top-k is how many tokens a served teacher is asked for, and none is served here; leave it out (what "
                "a cache keeps was said when it was captured)"
            )
        if self.lora < 0:
            raise UsageError(f"--lora is {self.lora}; it is a rank, and 0 trains all weights")
        if self.documents < 1:
            raise UsageError(f"documents is {self.documents}; at least one has to be measured on")
        for tracker in self.settings.report_to:
            require_tracker(tracker)

    def _require_taught(self) -> None:
        if self.combine != AVERAGE:
            raise UsageError(f"--combine {self.combine} is for several teachers; give --teacher more than once")
        require_teacher(self.sole, self.teacher_cache, student=self.student)
        if is_address(self.sole):
            require_bounded(self.objective, top_k=self.top_k)
        if self.objective.alive and self.teacher_cache is not None and not self.objective.recalled:
            raise UsageError(f"{self.objective.name} asks more of a teacher than a cache keeps; omit --teacher-cache")
        if self.objective.alive and (self.teacher is None or is_address(self.sole)):
            raise UsageError(
                f"{self.objective.name} reads a teacher's weights; give a --teacher whose weights are here"
            )
        require_answers(self.policy, self.objective, self.settings, teacher=self.sole, cache=self.teacher_cache)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Distill":
        """The stage that flat options (of the command line, a YAML file or Python) describe."""
        objective = Mixture.parse(
            options["objective"], cross_entropy=options["cross_entropy"], temperature=options["temperature"]
        )
        names = {"lr": "learning_rate"}
        flat = {names.get(k, k): v for k, v in options.items()}
        flat["report_to"] = tuple(flat.get("report_to") or ())
        settings = Settings(**{f.name: flat[f.name] for f in fields(Settings) if flat.get(f.name) is not None})
        if isinstance(given := flat.get("teacher"), list | tuple):
            flat["teacher"] = tuple(given) if len(given) > 1 else next(iter(given), None)
        own = {f.name for f in fields(cls)} - {"objective", "settings"}
        return cls(objective=objective, settings=settings, **{k: v for k, v in flat.items() if k in own})

    @property
    def policy(self) -> Policy:
        """Who writes the tokens."""
        return Policy(name=self.rollout, share=self.on_policy)

    @property
    def sole(self) -> str | None:
        """The teacher, where there is one."""
        assert not isinstance(self.teacher, tuple)
        return self.teacher

    @property
    def several(self) -> Several | None:
        """The teachers, where there are several."""
        return Several.of(self.teacher, self.combine) if isinstance(self.teacher, tuple) else None

    @property
    def sources(self) -> tuple[str | None, ...]:
        """Where each teacher is."""
        return (self.sole,) if self.several is None else tuple(self.several.sources.values())

    @property
    def alone(self) -> "Mapping[str, Distill]":
        """For each teacher, by its name as a network, the stage in which it alone teaches."""
        return {"teacher": self} if self.several is None else alone(self, self.several)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return as_value(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True) -> Run:
        """Prunes if it has to, trains, measures beside the teacher, and writes the folder.

        Raises:
            UsageError, NotFound, VocabularyMismatch, OutputExists: before anything is written.
            TrainingDiverged, Interrupted, ArtefactError: checkpoints stay in `out`/training for --resume.
        """
        with ranks.joined():
            return self._run(out, overwrite=overwrite, resume=resume, show=show and ranks.first())

    def _run(self, out: Path, *, overwrite: bool, resume: bool, show: bool) -> Run:
        several, caches = self.several, self.caches()
        cache = caches.get("teacher")
        if ranks.first():
            self._require_room(out, overwrite=overwrite, resume=resume)
        ranks.wait()
        device, dtype = backend.device(self.device), ranks.told(self.compute_dtype(out if resume else None, caches))
        pair = self.pair(dtype, caches)
        teacher = pair.teacher
        text = Text(
            data=self.data,
            eval_data=self.eval_data,
            columns=self.columns,
            context=self.settings.context,
            seed=self.settings.seed,
            route=None if several is None else several.route,
        )
        for one, kept in caches.items():
            said = pair.teachers[one]
            kept.require(
                {
                    **(teacher_facts(said) if isinstance(said, Loaded) else {}),
                    "dtype": backend.name_of(dtype),
                    **tokenizer_facts(pair.origin.tokenizer),
                    "context": self.settings.context,
                    "vocabulary": pair.vocabulary,
                    **({} if self.objective.recalled else {"temperature": self.objective.temperature}),
                }
            )
        prepared = prepare(
            text,
            pair.origin.tokenizer,
            tokens=self.settings.tokens,
            models=models_of(pair),
            documents=self.documents,
            caches=list(caches.values()),
            teacher_tokenizer=teacher.tokenizer if pair.across and isinstance(teacher, Loaded) else None,
        )
        require_known(prepared, pair)
        pair = pair._replace(chats=prepared.facts["kind"] != "text")
        pair.student.to(device)
        for said in pair.teachers.values():
            if isinstance(said, Loaded):
                said.model.to(device=device, dtype=dtype)
        if pair.across and pair.paired and pair.chats and any(Marks.unknown(*one[:2]) for one in pair.readers):
            note("a chat template here writes turns in a way that is not known, so the teacher reads them line by line")
        if not packed(pair):
            note("a model here mixes documents that are packed, so they are padded: slower, and the same numbers")
        reading = Reading(context=self.settings.context, vocabulary=pair.vocabulary, dtype=dtype)
        measuring = f"measuring on {len(prepared.rows)} documents"
        study = self.study(pair, dtype, caches)
        model = study.student
        tokenizer, writes = pair.origin.tokenizer, self.policy.writes
        rollout = rollout_of(
            self.policy,
            self.settings,
            pair.student,
            tokenizer,
            vocabulary=pair.vocabulary,
            beside=pair.packs(prepared.packs).beside if pair.across and pair.paired else dict,
        )
        announce(self, pair, prepared.packs, dtype, out, show=show)
        if writes:
            note(UNCOUNTED)
        told = {one: dict(kept.manifest.files) for one, kept in caches.items()}
        identity = identify(
            essence(self.to_dict()), [p.digest for p in pair.parents], prepared.digest, pair.details, told
        )
        ranks.require_same("settings, models or text", identity)
        ranks.require_same("student", ranks.digest_of_weights(model) if ranks.count() > 1 else "")
        with (
            leaving(pair.teachers.values()),
            disk(out),
            resumable(out),
            workplace(out, overwrite=overwrite, dtype=dtype) as folder,
        ):
            with waiting(f"{measuring} before training", show=show):
                beside = None if pair.across else teacher
                told_to = (pair.student, beside, prepared.rows, reading)
                before = before_training(folder / BASELINE, *told_to) if ranks.first() else []
            checked = self._examined(pair, prepared, dtype, cache, study)
            if cache is not None and isinstance(teacher, Loaded):
                teacher.model.to("meta")  # its memory is for training; it is read again to be measured beside
            outcome = train(
                study,
                pair.packs(prepared.packs, ahead=not writes),
                self.settings,
                folder,
                tokenizer=tokenizer,
                validation=pair.packs(prepared.validation_packs),
                rollout=rollout,
                identity=identity,
                resume=resume,
                title=out.name,
                show=show,
            )
            if not outcome.finished:
                raise KeyboardInterrupt
            student = adapters.merge(model) if self.lora else pair.student
            if not ranks.first():
                card, measures = ranks.told(None)
                return Run(out=out, card=card, model=student.eval(), tokenizer=pair.origin.tokenizer, measures=measures)
            if cache is not None and isinstance(teacher, Loaded):
                again = self._load(teacher.name)
                again.model.to(device=device, dtype=dtype)
                pair = pair._replace(teacher=again)
            with waiting(measuring, show=show):
                run = self._finish(out, pair, student.eval(), prepared, outcome, before, reading, checked)
            ranks.told((run.card, run.measures))
            return run

    def _examined(
        self, pair: Pair, prepared: Prepared, dtype: torch.dtype, cache: Cache | None, study: Study
    ) -> list[dict[str, str]]:
        """The quick invariants of this very pair, for its card.

        Raises: Unsound where one does not hold.
        """
        if self.skip_doctor:
            return [{"name": "invariants", "outcome": "not examined, by --skip-doctor"}]
        kind, checked = prepared.facts["kind"], []
        if pair.across and pair.paired:
            checks = list(examine_across(crossing_of(pair, prepared.packs, study, kind=kind), quick=True))
            for check in (check for check in checks if check.outcome == NOTE):
                note(f"{check.name}: {check.found}")
            return require_sound(checks)
        for network, here in live_teachers(pair):
            world = world_of(
                prepared.packs,
                student=pair.student,
                student_tokenizer=pair.origin.tokenizer,
                teacher=here.model if here else None,
                teacher_tokenizer=here.tokenizer if here else None,
                vocabulary=pair.vocabulary,
                kind=kind,
                compute=dtype,
                cache=cache,
                compared=self.objective.compared,
            )
            checked += [of_teacher(network, one) for one in require_sound(list(examine(world, QUICK)))]
        for network, one in pair.teachers.items():
            if isinstance(one, Absent):
                same = {"name": "same tokens", "outcome": f"{one.proof}, {pair.vocabulary:,} shared"}
                checked.insert(0, of_teacher(network, same))
        return checked

    def cache(self) -> Cache | None:
        """The teacher's cache, if one is named, and may serve the objective."""
        if self.teacher_cache is None:
            return None
        if self.settings.eval_every:
            raise UsageError("--eval-every reads held-out text, which --teacher-cache does not hold; give one of them")
        folder = Path(self.teacher_cache).expanduser()
        if found := next(faults(folder), None):
            raise ArtefactError(f"the cache {folder} is not whole: {found}; make it again")
        cache = Cache(folder)
        require_kept(self.objective, cache.manifest)
        return cache

    def caches(self) -> dict[str, Cache]:
        """The caches that are learnt from, by their teachers' names as networks."""
        found = {network: cache for network, one in self.alone.items() if (cache := one.cache()) is not None}
        if self.several is not None:
            require_sure(self.several, found)
        return found

    def study(self, pair: Pair, dtype: torch.dtype, caches: Mapping[str, Cache] = MappingProxyType({})) -> Study:
        """What is trained: the student of `pair` where it lies, with adapters if asked for, under the objective."""
        device = pair.student.device
        model = adapters.add(pair.student, self.lora, seed=self.settings.seed) if self.lora else pair.student
        teachers = pair.teachers.items() if self.objective.teaches else ()
        frozen = {network: self._speaker(one, caches.get(network)) for network, one in teachers}
        if self.settings.checkpoint_activations:
            require_checkpointing(model)
        objective = self._objective(pair)
        if isinstance(objective, nn.Module):
            objective.to(device)
        return Study(model.to(device), objective, frozen=frozen, vocabulary=pair.vocabularies, compute_dtype=dtype)

    def _speaker(self, teacher: Loaded | Absent, cache: Cache | None) -> PreTrainedModel | Companion:
        """What speaks for a teacher in training."""
        if isinstance(teacher, Absent):
            return teacher.companion
        if cache is None:
            return teacher.model
        return Recalled(cache, known_head(teacher.model)) if self.objective.recalled else cache

    def _objective(self, pair: Pair) -> Objective:
        """Its own weights, if any, are drawn by the seed, so that ranks and resumed runs begin alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            panel = None if self.several is None else self.several.panel
            return self.objective.build(pair.sides if self.objective.alive else None, panel)

    def compute_dtype(self, resumed: Path | None, caches: Mapping[str, Cache] = MappingProxyType({})) -> torch.dtype:
        """What matrices are multiplied in.

        Where it is not said, a resumed run keeps what was measured when it began, and one that learns from a cache
        multiplies as the teacher did that speaks in it.
        """
        auto = "auto"
        if resumed is not None and (resumed / TRAINING / COMPUTE).is_file():
            auto = (resumed / TRAINING / COMPUTE).read_text(encoding="utf-8").strip()
        elif caches:
            auto = next(iter(caches.values())).manifest.facts.dtype
        return backend.dtype(self.dtype, on=str(backend.device(self.device)), auto=auto)

    def pair(self, dtype: torch.dtype, caches: Mapping[str, Cache] = MappingProxyType({})) -> Pair:
        """Student and teacher in memory, with everything that can be refused refused; what is pruned, in `dtype`."""
        if self.several is not None:
            return pair_of(self.alone, caches, dtype)
        cache = caches.get("teacher")
        teacher = self.live(cache)
        if self.student is not None:
            origin = self._load(self.student)
            if teacher is None:
                away = Absent.of(self.sole, cache, origin.tokenizer, top_k=self.top_k)
                parents = [parent("student", origin), away.parent]
                return Pair(origin.model, origin, away, away.vocabulary, parents, {})
            parents = [parent("student", origin), parent("teacher", teacher)]
            try:
                vocabulary = shared_ids(teacher.tokenizer, origin.tokenizer)
            except VocabularyMismatch:
                if not self.objective.across:
                    raise
                own, warped = real_ids(origin.tokenizer), self.objective.warped
                return Pair(origin.model, origin, teacher, own, parents, {}, True, self.objective.teaches, warped)
            return Pair(origin.model, origin, teacher, vocabulary, parents, {})
        assert teacher is not None
        stage = Prune(
            model=teacher.name,
            data=self.data,
            columns=self.columns,
            keep=self.keep,
            params=self.params,
            strategy=self.strategy,
            seed=self.settings.seed,
            device=self.device,
            dtype=backend.name_of(dtype),
        )
        student, card = stage.apply(teacher)
        vocabulary = shared_ids(teacher.tokenizer, teacher.tokenizer)
        parents = [parent("teacher, which it was pruned from", teacher)]
        return Pair(student, teacher, teacher, vocabulary, parents, dict(card.details))

    def live(self, cache: Cache | None) -> Loaded | None:
        """The teacher's weights; None where they are not here and something else stands for them.

        Raises: NotFound where nothing does.
        """
        if self.sole is None or is_address(self.sole):
            return None
        try:
            return self._load(self.sole)
        except NotFound:
            if cache is None or self.student is None or self.objective.recalled:
                raise
            note(f"{self.sole} is not here, so what its cache says stands for it; it is not measured beside")
            return None

    def _load(self, name: str) -> Loaded:
        return load(name, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)

    def _require_room(self, out: Path, *, overwrite: bool, resume: bool) -> None:
        if resume and overwrite:
            raise UsageError("--resume continues the run in the folder and --overwrite discards it; give one of them")
        recover(out)
        if resume and out.is_dir() and not (out / TRAINING).is_dir() and any(out.iterdir()):
            raise OutputExists(f"{out} holds no unfinished run, so there is nothing to resume")
        require_apart(out, *self.sources, self.student, self.data, self.eval_data, self.teacher_cache)
        require_free(out, overwrite=overwrite or resume)

    def _finish(
        self,
        out: Path,
        pair: Pair,
        student: PreTrainedModel,
        text: Prepared,
        outcome: Outcome,
        before: Sequence[Measure],
        reading: Reading,
        checked: list[dict[str, Any]],
    ) -> Run:
        with writing(out, overwrite=True) as folder:
            save(student, pair.origin, folder)
            gap = reload_gap(student, folder, trust_remote_code=self.trust_remote_code)
            for file in (out / TRAINING).glob("*.jsonl"):
                shutil.copy(file, folder / file.name)
            made = dataclasses.replace(pair.origin, model=student, name=out.name, path=folder, note="")
            after = beside_teacher(made, pair.teacher, text.rows, reading, apart=text.teacher_rows)
            first = {"teacher": after["teacher"]} if "teacher" in after else {}
            measures = {**first, BEFORE: before, **after}
            card = Card(
                stage=self.to_dict(),
                seed=self.settings.seed,
                parents=pair.parents,
                data=text.facts,
                cost=outcome.to_dict(),
                measures=measures,
                invariants=[*checked, {"name": "logits after reload", "outcome": f"equal within {gap:.1e}"}],
                details=pair.details,
                command=command(),
            )
            writers = {"teacher": pair.teacher} if isinstance(pair.teacher, Loaded) else {}
            samples = to_markdown(
                side_by_side({**writers, out.name: made}, PROMPTS, writing=Writing(max_new_tokens=40))
            )
            curve = self._draw(folder, outcome)
            write_card(folder, card, title=out.name, samples=samples, curve=curve)
        return Run(out=out, card=card, model=student, tokenizer=pair.origin.tokenizer, measures=measures)

    def _draw(self, folder: Path, outcome: Outcome) -> str:
        """Draws `curve.png`; its name, or nothing where there is no line to draw."""
        terms = list(outcome.losses)
        with contextlib.suppress(DataError):
            draw_curve(folder / METRICS, folder / CURVE, terms=[*terms, *(f"eval_{term}" for term in terms)])
        return CURVE if (folder / CURVE).exists() else ""


def require_tracker(name: str) -> None:
    """Refuse a tracker that is none of ours, or not installed.

    Raises: UsageError, MissingDependency.
    """
    require_choice("report-to", name, TRACKERS)
    if importlib.util.find_spec(name) is None:
        raise MissingDependency(f"{name} is not installed; run: pip install {name}")
