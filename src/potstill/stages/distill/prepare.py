"""Read everything that a distillation needs: caches, models, text; and build what is trained."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from potstill.core.device import resolve_device
from potstill.core.measure import Measure
from potstill.data.cross_tokenizer.chat_translation import ChatMarkers
from potstill.evaluate.scoring_windows import ScoringConfig
from potstill.models.load import LoadedModel
from potstill.stages.console import print_note
from potstill.stages.dataset import PreparedDataset, prepare_dataset
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.distill.checks import run_quick_checks
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.draft_vocabulary import make_draft_vocabulary
from potstill.stages.distill.evaluation import evaluate_sizes, evaluate_student_and_teacher, measure_student
from potstill.stages.distill.models import check_caches, load_models, open_caches
from potstill.stages.distill.module import build_module
from potstill.stages.distill.resources import warn_if_insufficient
from potstill.stages.distill.rollouts import SAMPLING_TIME_NOTE, build_rollout
from potstill.stages.distill.teacher_windows import leave_out_long_windows
from potstill.stages.distill.text import prepare_text
from potstill.stages.model_pair import ModelPair, check_token_ids
from potstill.stages.run_models import choose_dtype, load_run_model
from potstill.stages.run_notes import report_passes
from potstill.stages.samples import count_sample_tokens, write_samples
from potstill.stages.training_run import TrainingRun
from potstill.teachers.cached import TeacherCache
from potstill.teachers.external import ExternalTeacher, closing_connections
from potstill.train import distributed


@dataclass(frozen=True, kw_only=True)
class DistillRun(TrainingRun):
    """A distillation with its models, caches and text in memory."""

    config: DistillConfig
    pair: ModelPair
    dataset: PreparedDataset
    caches: Mapping[str, TeacherCache]

    @property
    def measuring_status(self) -> str:
        """The line that is shown while the models are measured."""
        return f"measuring on {len(self.dataset.rows)} documents"

    @property
    def scoring(self) -> ScoringConfig:
        """How held-out documents are scored."""
        return ScoringConfig(context=self.config.settings.context, vocabulary=self.pair.vocabulary, dtype=self.dtype)

    @contextlib.contextmanager
    def connections(self) -> Iterator[None]:
        """Close the connections to served teachers at the end."""
        with closing_connections(self.pair.teachers.values()):
            yield

    def warn_if_insufficient(self, out: Path, *, show: bool) -> None:
        """Print the memory and disk that the run takes."""
        report_passes(self.config.settings, self.dataset.packs.num_tokens)
        warn_if_insufficient(self.config, self.pair, self.dataset.packs, self.dtype, out, show=show)
        if self.config.rollout_config.is_enabled:
            print_note(SAMPLING_TIME_NOTE)

    def measure_baseline(self) -> list[Measure]:
        """The student before training, compared with the first teacher where both have one tokenizer."""
        teacher = None if self.pair.is_cross_tokenizer else self.pair.teacher
        return measure_student(self.pair.student, teacher, self.dataset.rows, self.scoring)

    def run_checks(self) -> list[dict[str, str]]:
        """The quick checks of `potstill doctor` on these models and this text."""
        if self.config.skip_doctor:
            return [{"name": "invariants", "outcome": "not examined, by --skip-doctor"}]
        return run_quick_checks(
            self.pair, self.dataset, self.module, self.config.objective, dtype=self.dtype, caches=self.caches
        )

    def release_memory(self) -> None:
        """Drop the weights of a teacher whose cache replaces them in training."""
        for network, teacher in self.pair.loaded_teachers.items():
            if network in self.caches:
                teacher.model.to("meta")

    def measure(self, student: LoadedModel) -> Mapping[str, Sequence[Measure]]:
        """The student with its sizes, and the first teacher, on held-out documents."""
        teacher, rows = self._measuring_teacher, self.dataset.rows
        measures = evaluate_student_and_teacher(
            student, teacher, rows, self.scoring, teacher_rows=self.dataset.teacher_rows
        )
        return {**measures, **evaluate_sizes(student, teacher, rows, self.scoring)}

    def write_samples(self, student: LoadedModel) -> str:
        """What the student and the first teacher write after some prompts."""
        teacher = self._measuring_teacher
        models = {"teacher": teacher} if isinstance(teacher, LoadedModel) else {}
        return write_samples({**models, student.name: student})

    def check_samples(self) -> None:
        """Render the prompts of the samples with the templates of student and teacher."""
        models = (self.pair.origin, self.pair.teacher)
        count_sample_tokens([model for model in models if isinstance(model, LoadedModel)])

    @cached_property
    def _measuring_teacher(self) -> LoadedModel | ExternalTeacher:
        """The first teacher, whose weights are read again if they were released."""
        teacher = self.pair.teacher
        if not isinstance(teacher, LoadedModel) or teacher.model.device.type != "meta":
            return teacher
        reloaded = load_run_model(self.config, teacher.name)
        reloaded.move_to(resolve_device(self.config.device), self.dtype)
        return reloaded


def prepare(config: DistillConfig, resume_folder: Path | None = None) -> DistillRun:
    """Read caches, models and text, refuse what does not fit together, and build what is trained.

    `resume_folder` is the folder of a run that is continued; it keeps the dtype that it began with.

    Raises: UsageError, NotFound, DataError, VocabularyMismatch, CacheMismatch, ArtifactError.
    """
    caches = open_caches(config)
    dtype = distributed.broadcast_from_main(choose_dtype(config, caches, resume_folder=resume_folder))
    pair = load_models(config, caches, dtype)
    text_facts = prepare_text(config, pair, caches, resume_folder=resume_folder)
    check_caches(config, caches, pair, dtype)
    dataset = load_dataset(config, pair, caches)
    pair = pair._replace(is_chat=dataset.facts["kind"] != "text")
    dataset = leave_out_long_windows(pair, dataset)
    move_models(config, pair, dtype)
    print_limits(pair)
    draft_facts, draft_files = make_draft_vocabulary(config, pair, dataset.packs)
    module = build_module(config, pair, dtype, caches)
    rollout = build_rollout(
        config.rollout_config, config.settings.resolve_epochs(len(dataset.packs)), pair, dataset.packs
    )
    return DistillRun(
        config=config,
        module=module,
        student=pair.student,
        origin=pair.origin,
        packs=pair.prepare_packs(dataset.packs, prefetch=rollout is None),
        validation=pair.prepare_packs(dataset.validation_packs),
        dtype=dtype,
        parents=pair.parents,
        data={**dataset.facts, **text_facts, **draft_facts},
        data_digest=dataset.digest,
        details=pair.details,
        run_facts={network: dict(cache.manifest.files) for network, cache in caches.items()},
        text_facts=text_facts,
        files=draft_files,
        rollout=rollout,
        pair=pair,
        dataset=dataset,
        caches=caches,
    )


def load_dataset(config: DistillConfig, pair: ModelPair, caches: Mapping[str, TeacherCache]) -> PreparedDataset:
    """The text as packs to train on, and as documents to measure on.

    Raises: DataError, NotFound, UsageError, CacheMismatch; VocabularyMismatch for tokens that are not shared.
    """
    dataset = prepare_dataset(
        make_dataset_config(config),
        pair.origin.tokenizer,
        tokens=config.settings.tokens,
        models=pair.loaded_models if config.objective.uses_teacher else [pair.student],
        documents=config.documents,
        caches=list(caches.values()),
        teacher_tokenizer=get_teacher_tokenizer(pair),
    )
    check_token_ids(dataset, pair)
    return dataset


def get_teacher_tokenizer(pair: ModelPair) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a loaded teacher that reads documents differently: by other tokens or another chat template."""
    if not isinstance(pair.teacher, LoadedModel):
        return None
    tokenizer = pair.teacher.tokenizer
    is_different = pair.is_cross_tokenizer or tokenizer.chat_template != pair.origin.tokenizer.chat_template
    return tokenizer if is_different else None


def make_dataset_config(config: DistillConfig) -> DatasetConfig:
    """The text of a distillation, in windows of its context."""
    dataset_config = DatasetConfig.from_training(config, label=config.document_label)
    return replace(dataset_config, long_documents=config.long_documents)


def move_models(config: DistillConfig, pair: ModelPair, dtype: torch.dtype) -> None:
    """Move the student to the device, and the teachers there in the compute dtype."""
    device = resolve_device(config.device)
    pair.student.to(device)
    for teacher in pair.loaded_teachers.values():
        teacher.move_to(device, dtype)


def print_limits(pair: ModelPair) -> None:
    """Print a note where a chat template or a model forces a slower or coarser way."""
    if (
        pair.uses_teacher_tokens
        and pair.is_chat
        and any(ChatMarkers.has_unknown_template(reader.tokenizer, reader.pieces) for reader in pair.readers)
    ):
        print_note("a chat template here has turns of an unknown form, so the teacher reads them line by line")
    if not pair.supports_packing:
        print_note("a model here mixes documents that are packed, so they are padded: slower, and the same numbers")
