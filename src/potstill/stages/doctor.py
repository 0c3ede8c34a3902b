"""Is the loss right for this teacher, this student and this text? The invariants, on the user's own pair."""

import copy
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import DataError, UsageError, VocabularyMismatch
from potstill.data.corpus import load_corpus
from potstill.data.packing import Packs, pack
from potstill.data.tokenize import tokenize_corpus
from potstill.evaluate.perplexity import get_bos_id
from potstill.models.load import LoadedModel, load_model
from potstill.models.tokenizers.vocabulary import count_shared_ids, count_token_ids
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.checks.cross_tokenizer import run_cross_tokenizer_checks
from potstill.stages.checks.inputs import build_check_inputs, build_cross_tokenizer_inputs
from potstill.stages.checks.report import Check, run_checks
from potstill.stages.checks.same_tokenizer import ALL_CHECKS, report_vocabulary_mismatch
from potstill.stages.dataset import parse_columns
from potstill.stages.model_pair import ModelPair
from potstill.stages.stage import to_plain_dict
from potstill.teachers.cached import TeacherCache
from potstill.train.training_module import TrainingModule

SAMPLE_TOKENS = 50_000  # tokens of the text that packs are drawn from
CROSS_TOKENIZER_OBJECTIVE = "dskdv2_eta"  # the objective that is advised for a pair with two tokenizers


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Examines `teacher` and `student` (by default the teacher itself) on `data`, within a minute for small models.

    A pair with two tokenizers is examined under `objective`, which has to compare across; one with the same tokenizer
    under its divergence and temperature, or under the divergence inside a method.
    """

    kind: ClassVar[str] = "doctor"
    teacher: str
    student: str | None = None
    data: str = "stdlib"
    columns: str = ""
    teacher_cache: str | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    context: int = 512
    seed: int = 1
    device: str = "auto"
    dtype: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)

    def run(self) -> list[Check]:
        """Every check that applies.

        Raises: NotFound, UsageError, UnsafeModel and the like, as training would.
        """
        device = resolve_device(self.device)
        teacher = self._load_model(self.teacher)
        student_copy = replace(teacher, model=copy.deepcopy(teacher.model)) if self.student is None else None
        student = student_copy or self._load_model(str(self.student))
        try:
            pair = self._build_pair(student, teacher)
        except VocabularyMismatch as error:
            return [report_vocabulary_mismatch(error, command=self.cross_tokenizer_command)]
        cache = None if self.teacher_cache is None else TeacherCache(Path(self.teacher_cache).expanduser())
        cache_dtype = "auto" if cache is None else cache.manifest.facts.dtype
        compute_dtype = resolve_dtype(self.dtype, device_type=str(device), default=cache_dtype)
        corpus = load_corpus(self.data, columns=parse_columns(self.columns))
        try:
            packs = self._build_packs(corpus, student.tokenizer, cache)
        except DataError as error:
            reason = "prompts are given when it is asked, and answers are what is learnt"
            return [Check.from_result("text to train on", False, finding=str(error), why=reason, remedy="")]
        student.model.to(device)
        teacher.model.to(device=device, dtype=compute_dtype)
        if pair.is_cross_tokenizer:
            pair = pair._replace(is_chat=corpus.kind != "text")
            pair_inputs = build_cross_tokenizer_inputs(
                pair, packs, self._build_module(pair, teacher, compute_dtype), kind=corpus.kind
            )
            return list(run_cross_tokenizer_checks(pair_inputs))
        inputs = build_check_inputs(
            packs,
            student=student.model,
            student_tokenizer=student.tokenizer,
            teacher=teacher.model,
            teacher_tokenizer=teacher.tokenizer,
            vocabulary=pair.vocabulary,
            kind=corpus.kind,
            compute_dtype=compute_dtype,
            cache=cache,
            logit_objective=self.objective.logit_objective,
        )
        return list(run_checks(inputs, ALL_CHECKS))

    def _build_pair(self, student: LoadedModel, teacher: LoadedModel) -> ModelPair:
        """Both, and whether they have two tokenizers.

        Raises: VocabularyMismatch where they have, and the objective compares token by token.
        """
        needs_edit_alignment = self.objective.needs_edit_alignment
        try:
            return ModelPair(
                student.model,
                student,
                {"teacher": teacher},
                count_shared_ids(teacher.tokenizer, student.tokenizer),
                [],
                {},
            )
        except VocabularyMismatch:
            if not (self.objective.supports_cross_tokenizer and self.objective.uses_teacher):
                raise
        if self.teacher_cache is not None:
            raise UsageError("a cache holds one tokenizer's ids, and this pair has two; leave --teacher-cache out")
        return ModelPair(
            student.model,
            student,
            {"teacher": teacher},
            count_token_ids(student.tokenizer),
            [],
            {},
            is_cross_tokenizer=True,
            needs_edit_alignment=needs_edit_alignment,
        )

    @property
    def cross_tokenizer_command(self) -> str:
        """The call that examines this pair whatever its tokenizers."""
        models = ["--teacher", self.teacher, "--student", str(self.student)]
        return shlex.join(
            ["potstill", "doctor", *models, "--data", self.data, "--objective", CROSS_TOKENIZER_OBJECTIVE]
        )

    def _build_module(self, pair: ModelPair, teacher: LoadedModel, compute_dtype: torch.dtype) -> TrainingModule:
        """What `distill` would train."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            objective = self.objective.build(pair.pair_info)
        if isinstance(objective, nn.Module):
            objective.to(pair.student.device)
        frozen = {"teacher": teacher.model}
        return TrainingModule(
            pair.student, objective, frozen=frozen, vocabulary=pair.vocabulary_sizes, compute_dtype=compute_dtype
        )

    def _load_model(self, name: str) -> LoadedModel:
        return load_model(name, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)

    def _build_packs(self, corpus: Any, tokenizer: PreTrainedTokenizerBase, cache: TeacherCache | None) -> Packs:
        tokens = tokenize_corpus(corpus, tokenizer, limit=SAMPLE_TOKENS)
        is_cached = None if cache is None else cache.has_window
        return pack(tokens, length=self.context, seed=self.seed, bos=get_bos_id(tokenizer), keep_window=is_cached)
