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

from potstill.core.atomic_files import TRAINING_FOLDER, atomic_folder, check_output_free, recover_folder
from potstill.core.card import Card
from potstill.core.device import get_dtype_name, resolve_device, resolve_dtype
from potstill.core.errors import (
    ArtifactError,
    DataError,
    MissingDependency,
    NotFound,
    OutputExists,
    UsageError,
    VocabularyMismatch,
)
from potstill.core.metrics_log import METRICS_FILE
from potstill.core.types import Measure, Objective, SignalSource
from potstill.data.cross_tokenizer.chat_translation import ChatMarkers
from potstill.decode.generate import GenerationOptions
from potstill.evaluate.charts.plots import draw_curve
from potstill.evaluate.samples import format_markdown, generate_samples
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.models.fingerprint import fingerprint_teacher, fingerprint_tokenizer
from potstill.models.load import LoadedModel, load_model
from potstill.models.signals import get_constant_head
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_token_ids
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.checks.cross_tokenizer import run_cross_tokenizer_checks
from potstill.stages.checks.inputs import build_check_inputs, build_cross_tokenizer_inputs
from potstill.stages.checks.report import NOTE, run_checks
from potstill.stages.checks.same_tokenizer import QUICK_CHECKS, SHARED_VOCABULARY
from potstill.stages.console import explain_write_errors, get_command, print_note, show_status
from potstill.stages.dataset import DatasetConfig, PreparedDataset, prepare_dataset
from potstill.stages.distill.ensemble import (
    AVERAGE,
    EnsembleConfig,
    build_single_teacher_configs,
    check_confidence_caches,
    get_loaded_teachers,
    label_check,
    load_ensemble,
)
from potstill.stages.distill.evaluation import BEFORE_TRAINING, evaluate_baseline, evaluate_student_and_teacher
from potstill.stages.distill.rollouts import SAMPLING_TIME_NOTE, build_rollout, check_rollout
from potstill.stages.doctor import raise_if_failed
from potstill.stages.model_card import write_card
from potstill.stages.model_pair import ModelPair, check_token_ids, get_loaded_models, supports_packing
from potstill.stages.option_checks import check_choice, check_output_not_input, check_size_options, check_strategy
from potstill.stages.prune import PruneConfig, compute_reload_gap, save_model
from potstill.stages.resources.estimate import warn_if_insufficient
from potstill.stages.run_folder import DTYPE_FILE, explain_interrupt, training_folder
from potstill.stages.stage import make_parent, reproducible_options, to_plain_dict
from potstill.teachers.cached import CachedHiddenStates, TeacherCache, find_faults
from potstill.teachers.external import (
    ExternalTeacher,
    check_cache_supports,
    check_server_supports,
    check_teacher_source,
    closing_connections,
)
from potstill.teachers.http_client import is_address
from potstill.teachers.served import TOP_K
from potstill.train import distributed
from potstill.train.activation_checkpointing import check_activation_checkpointing
from potstill.train.config import TrainConfig
from potstill.train.lora import add_adapters, merge_adapters
from potstill.train.rollouts.config import GKD, RolloutConfig
from potstill.train.run import TrainResult, compute_run_id, train
from potstill.train.training_module import TrainingModule
from potstill.transforms.fit import AUTO

SAMPLE_PROMPTS = ("What is a pot still?", "Write one sentence about the sea.", "How do I read a file in Python?")
BASELINE_FILE = "before.json"  # the measures of the student when it began
CURVE_FILE = "curve.png"
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class DistillResult:
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
class DistillConfig:
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
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    settings: TrainConfig = field(default_factory=TrainConfig)
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
        check_size_options({"student": self.student, "keep": self.keep, "params": self.params})
        check_strategy(self.strategy)
        if self.ensemble is None:
            self._check_teacher_options()
        else:
            _ = self.single_teacher_configs  # each of several is checked as if it taught alone
        if self.top_k != TOP_K and not any(map(is_address, self.teacher_locations)):
            raise UsageError(
                "--top-k is how many tokens a served teacher is asked for, and none is served here; leave it out (what "
                "a cache keeps was said when it was captured)"
            )
        if self.lora < 0:
            raise UsageError(f"--lora is {self.lora}; it is a rank, and 0 trains all weights")
        if self.documents < 1:
            raise UsageError(f"documents is {self.documents}; at least one has to be measured on")
        for tracker in self.settings.report_to:
            check_tracker(tracker)

    def _check_teacher_options(self) -> None:
        if self.combine != AVERAGE:
            raise UsageError(f"--combine {self.combine} is for several teachers; give --teacher more than once")
        check_teacher_source(self.single_teacher, self.teacher_cache, student=self.student)
        if is_address(self.single_teacher):
            check_server_supports(self.objective, top_k=self.top_k)
        if (
            self.objective.needs_teacher_model
            and self.teacher_cache is not None
            and not self.objective.needs_only_last_hidden
        ):
            raise UsageError(f"{self.objective.name} asks more of a teacher than a cache keeps; omit --teacher-cache")
        if self.objective.needs_teacher_model and (self.teacher is None or is_address(self.single_teacher)):
            raise UsageError(
                f"{self.objective.name} reads a teacher's weights; give a --teacher whose weights are here"
            )
        check_rollout(
            self.rollout_config, self.objective, self.settings, teacher=self.single_teacher, cache=self.teacher_cache
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "DistillConfig":
        """The stage that flat options (of the command line, a YAML file or Python) describe."""
        objective = ObjectiveConfig.parse(
            options["objective"], cross_entropy=options["cross_entropy"], temperature=options["temperature"]
        )
        aliases = {"lr": "learning_rate"}
        flat_options = {aliases.get(k, k): v for k, v in options.items()}
        flat_options["report_to"] = tuple(flat_options.get("report_to") or ())
        settings = TrainConfig(
            **{f.name: flat_options[f.name] for f in fields(TrainConfig) if flat_options.get(f.name) is not None}
        )
        if isinstance(teachers := flat_options.get("teacher"), list | tuple):
            flat_options["teacher"] = tuple(teachers) if len(teachers) > 1 else next(iter(teachers), None)
        field_names = {f.name for f in fields(cls)} - {"objective", "settings"}
        return cls(
            objective=objective, settings=settings, **{k: v for k, v in flat_options.items() if k in field_names}
        )

    @property
    def rollout_config(self) -> RolloutConfig:
        """Who writes the tokens."""
        return RolloutConfig(name=self.rollout, share=self.on_policy)

    @property
    def single_teacher(self) -> str | None:
        """The teacher, where there is one."""
        assert not isinstance(self.teacher, tuple)
        return self.teacher

    @property
    def ensemble(self) -> EnsembleConfig | None:
        """The teachers, where there are several."""
        return EnsembleConfig.from_options(self.teacher, self.combine) if isinstance(self.teacher, tuple) else None

    @property
    def teacher_locations(self) -> tuple[str | None, ...]:
        """Where each teacher is."""
        return (self.single_teacher,) if self.ensemble is None else tuple(self.ensemble.sources.values())

    @property
    def single_teacher_configs(self) -> "Mapping[str, DistillConfig]":
        """For each teacher, by its name as a network, the stage in which it alone teaches."""
        return {"teacher": self} if self.ensemble is None else build_single_teacher_configs(self, self.ensemble)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True) -> DistillResult:
        """Prunes if it has to, trains, measures beside the teacher, and writes the folder.

        Raises:
            UsageError, NotFound, VocabularyMismatch, OutputExists: before anything is written.
            TrainingDiverged, Interrupted, ArtefactError: checkpoints stay in `out`/training for --resume.
        """
        with distributed.process_group():
            return self._run(out, overwrite=overwrite, resume=resume, show=show and distributed.is_main_process())

    def _run(self, out: Path, *, overwrite: bool, resume: bool, show: bool) -> DistillResult:
        ensemble, caches = self.ensemble, self.open_caches()
        cache = caches.get("teacher")
        if distributed.is_main_process():
            self._check_output_folder(out, overwrite=overwrite, resume=resume)
        distributed.barrier()
        device, dtype = (
            resolve_device(self.device),
            distributed.broadcast_from_main(self.compute_dtype(out if resume else None, caches)),
        )
        pair = self.load_models(dtype, caches)
        teacher = pair.teacher
        dataset_config = DatasetConfig(
            data=self.data,
            eval_data=self.eval_data,
            columns=self.columns,
            context=self.settings.context,
            seed=self.settings.seed,
            route=None if ensemble is None else ensemble.route,
        )
        for network, teacher_cache in caches.items():
            ensemble_teacher = pair.teachers[network]
            teacher_cache.check_facts(
                {
                    **(fingerprint_teacher(ensemble_teacher) if isinstance(ensemble_teacher, LoadedModel) else {}),
                    "dtype": get_dtype_name(dtype),
                    **fingerprint_tokenizer(pair.origin.tokenizer),
                    "context": self.settings.context,
                    "vocabulary": pair.vocabulary,
                    **({} if self.objective.needs_only_last_hidden else {"temperature": self.objective.temperature}),
                }
            )
        dataset = prepare_dataset(
            dataset_config,
            pair.origin.tokenizer,
            tokens=self.settings.tokens,
            models=get_loaded_models(pair),
            documents=self.documents,
            caches=list(caches.values()),
            teacher_tokenizer=teacher.tokenizer
            if pair.is_cross_tokenizer and isinstance(teacher, LoadedModel)
            else None,
        )
        check_token_ids(dataset, pair)
        pair = pair._replace(is_chat=dataset.facts["kind"] != "text")
        pair.student.to(device)
        for ensemble_teacher in pair.teachers.values():
            if isinstance(ensemble_teacher, LoadedModel):
                ensemble_teacher.model.to(device=device, dtype=dtype)
        if (
            pair.is_cross_tokenizer
            and pair.needs_teacher_tokens
            and pair.is_chat
            and any(ChatMarkers.has_unknown_template(*network[:2]) for network in pair.readers)
        ):
            print_note(
                "a chat template here writes turns in a way that is not known, so the teacher reads them line by line"
            )
        if not supports_packing(pair):
            print_note("a model here mixes documents that are packed, so they are padded: slower, and the same numbers")
        reading = ScoringConfig(context=self.settings.context, vocabulary=pair.vocabulary, dtype=dtype)
        status = f"measuring on {len(dataset.rows)} documents"
        module = self.build_module(pair, dtype, caches)
        model = module.student
        tokenizer, generates_text = pair.origin.tokenizer, self.rollout_config.is_enabled
        rollout = build_rollout(
            self.rollout_config,
            self.settings,
            pair.student,
            tokenizer,
            vocabulary=pair.vocabulary,
            add_teacher_tokens=pair.prepare_packs(dataset.packs).add_teacher_inputs
            if pair.is_cross_tokenizer and pair.needs_teacher_tokens
            else dict,
        )
        warn_if_insufficient(self, pair, dataset.packs, dtype, out, show=show)
        if generates_text:
            print_note(SAMPLING_TIME_NOTE)
        cache_files = {network: dict(teacher_cache.manifest.files) for network, teacher_cache in caches.items()}
        identity = compute_run_id(
            reproducible_options(self.to_dict()),
            [model_parent.digest for model_parent in pair.parents],
            dataset.digest,
            pair.details,
            cache_files,
        )
        distributed.check_same_on_all_ranks("settings, models or text", identity)
        distributed.check_same_on_all_ranks(
            "student", distributed.hash_weights(model) if distributed.world_size() > 1 else ""
        )
        with (
            closing_connections(pair.teachers.values()),
            explain_write_errors(out),
            explain_interrupt(out),
            training_folder(out, overwrite=overwrite, marker=(DTYPE_FILE, get_dtype_name(dtype))) as folder,
        ):
            with show_status(f"{status} before training", show=show):
                comparable_teacher = None if pair.is_cross_tokenizer else teacher
                baseline_inputs = (pair.student, comparable_teacher, dataset.rows, reading)
                baseline = (
                    evaluate_baseline(folder / BASELINE_FILE, *baseline_inputs) if distributed.is_main_process() else []
                )
            check_records = self._run_quick_checks(pair, dataset, dtype, cache, module)
            if cache is not None and isinstance(teacher, LoadedModel):
                teacher.model.to("meta")  # its memory is for training; it is read again to be measured beside
            result = train(
                module,
                pair.prepare_packs(dataset.packs, prefetch=not generates_text),
                self.settings,
                folder,
                tokenizer=tokenizer,
                validation=pair.prepare_packs(dataset.validation_packs),
                rollout=rollout,
                run_id=identity,
                resume=resume,
                title=out.name,
                show=show,
            )
            if not result.finished:
                raise KeyboardInterrupt
            student = merge_adapters(model) if self.lora else pair.student
            if not distributed.is_main_process():
                card, measures = distributed.broadcast_from_main(None)
                return DistillResult(
                    out=out, card=card, model=student.eval(), tokenizer=pair.origin.tokenizer, measures=measures
                )
            if cache is not None and isinstance(teacher, LoadedModel):
                reloaded_teacher = self._load_model(teacher.name)
                reloaded_teacher.model.to(device=device, dtype=dtype)
                pair = pair._replace(teacher=reloaded_teacher)
            with show_status(status, show=show):
                distill_result = self._publish(
                    out, pair, student.eval(), dataset, result, baseline, reading, check_records
                )
            distributed.broadcast_from_main((distill_result.card, distill_result.measures))
            return distill_result

    def _run_quick_checks(
        self,
        pair: ModelPair,
        dataset: PreparedDataset,
        dtype: torch.dtype,
        cache: TeacherCache | None,
        module: TrainingModule,
    ) -> list[dict[str, str]]:
        """The quick invariants of this very pair, for its card.

        Raises: Unsound where one does not hold.
        """
        if self.skip_doctor:
            return [{"name": "invariants", "outcome": "not examined, by --skip-doctor"}]
        kind, records = dataset.facts["kind"], []
        if pair.is_cross_tokenizer and pair.needs_teacher_tokens:
            checks = list(
                run_cross_tokenizer_checks(
                    build_cross_tokenizer_inputs(pair, dataset.packs, module, kind=kind), quick=True
                )
            )
            for check in (check for check in checks if check.outcome == NOTE):
                print_note(f"{check.name}: {check.found}")
            return raise_if_failed(checks)
        for network, loaded in get_loaded_teachers(pair):
            check_inputs = build_check_inputs(
                dataset.packs,
                student=pair.student,
                student_tokenizer=pair.origin.tokenizer,
                teacher=loaded.model if loaded else None,
                teacher_tokenizer=loaded.tokenizer if loaded else None,
                vocabulary=pair.vocabulary,
                kind=kind,
                compute_dtype=dtype,
                cache=cache,
                logit_objective=self.objective.logit_objective,
            )
            records += [
                label_check(network, entry) for entry in raise_if_failed(list(run_checks(check_inputs, QUICK_CHECKS)))
            ]
        for network, entry in pair.teachers.items():
            if isinstance(entry, ExternalTeacher):
                outcome = f"{entry.proof}, {pair.vocabulary:,} shared"
                vocabulary_check = {"name": SHARED_VOCABULARY, "outcome": outcome}
                records.insert(0, label_check(network, vocabulary_check))
        return records

    def open_cache(self) -> TeacherCache | None:
        """The teacher's cache, if one is named, and may serve the objective."""
        if self.teacher_cache is None:
            return None
        if self.settings.eval_every:
            raise UsageError("--eval-every reads held-out text, which --teacher-cache does not hold; give one of them")
        folder = Path(self.teacher_cache).expanduser()
        if fault := next(find_faults(folder), None):
            raise ArtifactError(f"the cache {folder} is not whole: {fault}; make it again")
        cache = TeacherCache(folder)
        check_cache_supports(self.objective, cache.manifest)
        return cache

    def open_caches(self) -> dict[str, TeacherCache]:
        """The caches that are learnt from, by their teachers' names as networks."""
        caches = {
            network: cache
            for network, config in self.single_teacher_configs.items()
            if (cache := config.open_cache()) is not None
        }
        if self.ensemble is not None:
            check_confidence_caches(self.ensemble, caches)
        return caches

    def build_module(
        self, pair: ModelPair, dtype: torch.dtype, caches: Mapping[str, TeacherCache] = MappingProxyType({})
    ) -> TrainingModule:
        """What is trained: the student of `pair` where it lies, with adapters if asked for, under the objective."""
        device = pair.student.device
        model = add_adapters(pair.student, self.lora, seed=self.settings.seed) if self.lora else pair.student
        teachers = pair.teachers.items() if self.objective.uses_teacher else ()
        frozen = {network: self._get_signal_source(teacher, caches.get(network)) for network, teacher in teachers}
        if self.settings.checkpoint_activations:
            check_activation_checkpointing(model)
        objective = self._build_objective(pair)
        if isinstance(objective, nn.Module):
            objective.to(device)
        return TrainingModule(
            model.to(device), objective, frozen=frozen, vocabulary=pair.vocabulary_sizes, compute_dtype=dtype
        )

    def _get_signal_source(
        self, teacher: LoadedModel | ExternalTeacher, cache: TeacherCache | None
    ) -> PreTrainedModel | SignalSource:
        """What speaks for a teacher in training."""
        if isinstance(teacher, ExternalTeacher):
            return teacher.signal_source
        if cache is None:
            return teacher.model
        return (
            CachedHiddenStates(cache, get_constant_head(teacher.model))
            if self.objective.needs_only_last_hidden
            else cache
        )

    def _build_objective(self, pair: ModelPair) -> Objective:
        """Its own weights, if any, are drawn by the seed, so that ranks and resumed runs begin alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            panel = None if self.ensemble is None else self.ensemble.panel
            return self.objective.build(pair.pair_info if self.objective.needs_teacher_model else None, panel)

    def compute_dtype(
        self, resume_folder: Path | None, caches: Mapping[str, TeacherCache] = MappingProxyType({})
    ) -> torch.dtype:
        """What matrices are multiplied in.

        Where it is not said, a resumed run keeps what was measured when it began, and one that learns from a cache
        multiplies as the teacher did that speaks in it.
        """
        default_dtype = "auto"
        if resume_folder is not None and (resume_folder / TRAINING_FOLDER / DTYPE_FILE).is_file():
            default_dtype = (resume_folder / TRAINING_FOLDER / DTYPE_FILE).read_text(encoding="utf-8").strip()
        elif caches:
            default_dtype = next(iter(caches.values())).manifest.facts.dtype
        return resolve_dtype(self.dtype, device_type=str(resolve_device(self.device)), default=default_dtype)

    def load_models(self, dtype: torch.dtype, caches: Mapping[str, TeacherCache] = MappingProxyType({})) -> ModelPair:
        """Student and teacher in memory, with everything that can be refused refused; what is pruned, in `dtype`."""
        if self.ensemble is not None:
            return load_ensemble(self.single_teacher_configs, caches, dtype)
        cache = caches.get("teacher")
        teacher = self.load_teacher(cache)
        if self.student is not None:
            origin = self._load_model(self.student)
            if teacher is None:
                external_teacher = ExternalTeacher.from_cache_or_server(
                    self.single_teacher, cache, origin.tokenizer, top_k=self.top_k
                )
                parents = [make_parent("student", origin), external_teacher.parent]
                return ModelPair(origin.model, origin, external_teacher, external_teacher.vocabulary, parents, {})
            parents = [make_parent("student", origin), make_parent("teacher", teacher)]
            try:
                vocabulary = count_shared_ids(teacher.tokenizer, origin.tokenizer)
            except VocabularyMismatch:
                if not self.objective.supports_cross_tokenizer:
                    raise
                student_vocabulary, needs_edit_alignment = (
                    count_token_ids(origin.tokenizer),
                    self.objective.needs_edit_alignment,
                )
                return ModelPair(
                    origin.model,
                    origin,
                    teacher,
                    student_vocabulary,
                    parents,
                    {},
                    True,
                    self.objective.uses_teacher,
                    needs_edit_alignment,
                )
            return ModelPair(origin.model, origin, teacher, vocabulary, parents, {})
        assert teacher is not None
        prune_config = PruneConfig(
            model=teacher.name,
            data=self.data,
            columns=self.columns,
            keep=self.keep,
            params=self.params,
            strategy=self.strategy,
            seed=self.settings.seed,
            device=self.device,
            dtype=get_dtype_name(dtype),
        )
        student, card = prune_config.apply(teacher)
        vocabulary = count_shared_ids(teacher.tokenizer, teacher.tokenizer)
        parents = [make_parent("teacher, which it was pruned from", teacher)]
        return ModelPair(student, teacher, teacher, vocabulary, parents, dict(card.details))

    def load_teacher(self, cache: TeacherCache | None) -> LoadedModel | None:
        """The teacher's weights; None where they are not here and something else stands for them.

        Raises: NotFound where nothing does.
        """
        if self.single_teacher is None or is_address(self.single_teacher):
            return None
        try:
            return self._load_model(self.single_teacher)
        except NotFound:
            if cache is None or self.student is None or self.objective.needs_only_last_hidden:
                raise
            print_note(
                f"{self.single_teacher} is not here, so what its cache says stands for it; it is not measured beside"
            )
            return None

    def _load_model(self, name: str) -> LoadedModel:
        return load_model(name, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)

    def _check_output_folder(self, out: Path, *, overwrite: bool, resume: bool) -> None:
        if resume and overwrite:
            raise UsageError("--resume continues the run in the folder and --overwrite discards it; give one of them")
        recover_folder(out)
        if resume and out.is_dir() and not (out / TRAINING_FOLDER).is_dir() and any(out.iterdir()):
            raise OutputExists(f"{out} holds no unfinished run, so there is nothing to resume")
        check_output_not_input(
            out, *self.teacher_locations, self.student, self.data, self.eval_data, self.teacher_cache
        )
        check_output_free(out, overwrite=overwrite or resume)

    def _publish(
        self,
        out: Path,
        pair: ModelPair,
        student: PreTrainedModel,
        dataset: PreparedDataset,
        result: TrainResult,
        baseline: Sequence[Measure],
        reading: ScoringConfig,
        check_records: list[dict[str, Any]],
    ) -> DistillResult:
        with atomic_folder(out, overwrite=True) as folder:
            save_model(student, pair.origin, folder)
            gap = compute_reload_gap(student, folder, trust_remote_code=self.trust_remote_code)
            for file in (out / TRAINING_FOLDER).glob("*.jsonl"):
                shutil.copy(file, folder / file.name)
            loaded_student = dataclasses.replace(pair.origin, model=student, name=out.name, path=folder, note="")
            final_measures = evaluate_student_and_teacher(
                loaded_student, pair.teacher, dataset.rows, reading, teacher_rows=dataset.teacher_rows
            )
            teacher_measures = {"teacher": final_measures["teacher"]} if "teacher" in final_measures else {}
            measures = {**teacher_measures, BEFORE_TRAINING: baseline, **final_measures}
            card = Card(
                stage=self.to_dict(),
                seed=self.settings.seed,
                parents=pair.parents,
                data=dataset.facts,
                cost=result.to_dict(),
                measures=measures,
                invariants=[*check_records, {"name": "logits after reload", "outcome": f"equal within {gap:.1e}"}],
                details=pair.details,
                command=get_command(),
            )
            models = {"teacher": pair.teacher} if isinstance(pair.teacher, LoadedModel) else {}
            samples = format_markdown(
                generate_samples(
                    {**models, out.name: loaded_student}, SAMPLE_PROMPTS, options=GenerationOptions(max_new_tokens=40)
                )
            )
            curve = self._draw_curve(folder, result)
            write_card(folder, card, title=out.name, samples=samples, curve=curve)
        return DistillResult(out=out, card=card, model=student, tokenizer=pair.origin.tokenizer, measures=measures)

    def _draw_curve(self, folder: Path, result: TrainResult) -> str:
        """Draws `curve.png`; its name, or nothing where there is no line to draw."""
        terms = list(result.losses)
        with contextlib.suppress(DataError):
            draw_curve(folder / METRICS_FILE, folder / CURVE_FILE, terms=[*terms, *(f"eval_{term}" for term in terms)])
        return CURVE_FILE if (folder / CURVE_FILE).exists() else ""


def check_tracker(name: str) -> None:
    """Refuse a tracker that is none of ours, or not installed.

    Raises: UsageError, MissingDependency.
    """
    check_choice("report-to", name, TRACKERS)
    if importlib.util.find_spec(name) is None:
        raise MissingDependency(f"{name} is not installed; run: pip install {name}")
