"""Doctor: checks that training computes the right loss for the user's own teacher, student and text."""

import copy
import shlex
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError, UsageError, VocabularyMismatch
from potstill.data.packing import Packs, pack
from potstill.data.tokenize import tokenize_corpus
from potstill.evaluate.perplexity import get_bos_id
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.vocabulary import count_shared_ids
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.align.doctor import examine_options
from potstill.stages.alignment_options import refuse_alignment_options
from potstill.stages.checks.cross_tokenizer import run_cross_tokenizer_checks
from potstill.stages.checks.inputs import build_check_inputs, build_cross_tokenizer_inputs
from potstill.stages.checks.report import Check, run_checks
from potstill.stages.checks.same_tokenizer import ALL_CHECKS, report_vocabulary_mismatch
from potstill.stages.corpus import load_data
from potstill.stages.distill.checks import label_check
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.ensemble import TeacherOptions
from potstill.stages.distill.models import pair_models
from potstill.stages.distill.module import build_module
from potstill.stages.distill.prepare import move_models
from potstill.stages.distill.text import prepare_text
from potstill.stages.model_pair import ModelPair, check_causality
from potstill.stages.options import DoctorOptions
from potstill.stages.run_models import choose_dtype, load_run_model
from potstill.stages.stage import to_plain_dict
from potstill.stages.text_options import get_text_options, make_rendering
from potstill.teachers.cached import TeacherCache
from potstill.teachers.served import TOP_K
from potstill.train.config import TrainConfig
from potstill.train.rollouts.config import MINILLM

SAMPLE_TOKENS = 50_000  # tokens of the text that packs are drawn from
CROSS_TOKENIZER_OBJECTIVE = "dskdv2_eta"  # the objective that is advised for a pair with two tokenizers


@dataclass(frozen=True, kw_only=True)
class Doctor(DoctorOptions):
    """Check `teacher` and `student` (by default a copy of the teacher) on `data`; a minute for small models.

    Two tokenizers need an `objective` that compares across them. With one tokenizer the checks use the objective's
    divergence and temperature, or the divergence inside a method. It checks several teachers one after another.
    """

    kind: ClassVar[str] = "doctor"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def to_dict(self) -> dict[str, Any]:
        """The stage as plain data."""
        return to_plain_dict(self)

    @cached_property
    def config(self) -> DistillConfig:
        """The distillation of the checked pair; without a student, the teacher is its own."""
        context = TrainConfig.context if self.context is None else self.context
        sampling = {"rollout": MINILLM, "on_policy": 0.5} if self.objective.name == MINILLM else {}
        first = TeacherOptions.parse(self.teacher, self.combine, cache=None, top_k=TOP_K).sources[0]
        return DistillConfig(
            teacher=self.teacher,
            combine=self.combine,
            student=self.student or first.location,
            **get_text_options(self),
            data=self.data,
            columns=self.columns,
            objective=self.objective,
            settings=TrainConfig(context=context, batch_tokens=max(context, 2048), seed=self.seed),
            device=self.device,
            dtype=self.dtype,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
            **sampling,  # type: ignore[arg-type]
        )

    def run(self) -> list[Check]:
        """Every check that applies; with several teachers, each check has the name of its teacher.

        Raises: UsageError, NotFound, UnsafeModel and the like, as training would.
        """
        if self.objective.data != "text":
            return examine_options(self, self.objective)
        refuse_alignment_options(asdict(self))
        sources = self.config.teachers
        if len(sources) > 1 and self.teacher_cache is not None:
            raise UsageError(
                "--teacher-cache needs one teacher to compare with, and you gave several; give one of them"
            )
        if away := [source.location or source.cache for source in sources if source.kind != "local"]:
            raise UsageError(
                f"doctor runs the teacher, and {away[0]} is not on this machine; give a local model as --teacher"
            )
        self.config.inputs.check()
        student = None if self.student is None else load_run_model(self.config, self.student)
        checks: list[Check] = []
        for source in sources:
            teacher = load_run_model(self.config, str(source.location))
            student = student or replace(teacher, model=copy.deepcopy(teacher.model))
            results = self._check(student, teacher)
            checks += [replace(check, name=label_check(source.network, check.name)) for check in results]
        return checks

    def _check(self, student: LoadedModel, teacher: LoadedModel) -> list[Check]:
        """The checks of a student with one teacher."""
        try:
            pair = self._pair_models(student, teacher)
        except VocabularyMismatch as error:
            return [report_vocabulary_mismatch(error, command=self.cross_tokenizer_command)]
        cache = None if self.teacher_cache is None else TeacherCache(Path(self.teacher_cache).expanduser())
        caches = {} if cache is None else {"teacher": cache}
        dtype = choose_dtype(self.config, caches)
        prepare_text(self.config, pair, caches)
        corpus = load_data(self)
        try:
            packs = self._build_packs(corpus, student.tokenizer, cache)
        except DataError as error:
            reason = "a run needs answers to learn from; prompts alone are not trained on"
            return [Check.from_result("text to train on", False, finding=str(error), why=reason, remedy="")]
        pair = pair._replace(is_chat=corpus.kind != "text")
        move_models(self.config, pair, dtype)
        check_causality(pair)
        if pair.is_cross_tokenizer:
            module = build_module(self.config, pair, dtype)
            return list(run_cross_tokenizer_checks(build_cross_tokenizer_inputs(pair, packs, module, kind=corpus.kind)))
        inputs = build_check_inputs(
            packs,
            student=student.model,
            student_tokenizer=student.tokenizer,
            teacher=teacher.model,
            teacher_tokenizer=teacher.tokenizer,
            vocabulary=pair.vocabulary,
            kind=corpus.kind,
            compute_dtype=dtype,
            cache=cache,
            logit_objective=self.objective.logit_objective,
        )
        return list(run_checks(inputs, ALL_CHECKS))

    def _pair_models(self, student: LoadedModel, teacher: LoadedModel) -> ModelPair:
        """Both models; two tokenizers only under an objective that compares across them.

        Raises: VocabularyMismatch.
        """
        if not self.objective.uses_teacher:
            count_shared_ids(teacher.tokenizer, student.tokenizer)
        pair = pair_models(self.config, student, teacher)
        if pair.is_cross_tokenizer and self.teacher_cache is not None:
            raise UsageError("a cache has the ids of one tokenizer, and this pair has two; omit --teacher-cache")
        return pair

    @property
    def cross_tokenizer_command(self) -> str:
        """The command that checks this pair whatever its tokenizers."""
        names = (self.data,) if isinstance(self.data, str) else self.data
        data = [word for name in names for word in ("--data", name)]
        models = ["--teacher", str(self.config.teachers[0].location), "--student", str(self.student)]
        return shlex.join(["potstill", "doctor", *models, *data, "--objective", CROSS_TOKENIZER_OBJECTIVE])

    def _build_packs(self, corpus: Any, tokenizer: PreTrainedTokenizerBase, cache: TeacherCache | None) -> Packs:
        tokens = tokenize_corpus(corpus, tokenizer, limit=SAMPLE_TOKENS, rendering=make_rendering(self))
        is_cached = None if cache is None else cache.has_window
        return pack(
            tokens,
            length=self.config.settings.context,
            seed=self.seed,
            bos=get_bos_id(tokenizer),
            keep_window=is_cached,
        )
