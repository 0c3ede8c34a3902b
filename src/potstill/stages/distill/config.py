"""The options of a distillation, as one value."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

from potstill.core.errors import UsageError
from potstill.core.options import list_options
from potstill.data.long_documents import LongDocuments
from potstill.data.row_reader import DocumentLabel, Language
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.ensemble import TeacherOptions, TeacherSource
from potstill.stages.distill.validation import (
    check_documents,
    check_draft_vocabulary,
    check_ensemble,
    check_lora_rank,
    check_sizes,
    check_teacher,
    check_text_objective,
    check_top_k,
    check_tracker,
    check_trained_names,
)
from potstill.stages.option_checks import check_save_dtype, check_size_options, check_strategy
from potstill.stages.options import DATA, DistillOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.stage import to_plain_dict
from potstill.train.config import TrainConfig
from potstill.train.rollouts.config import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(DistillOptions):
    """Train `student` (or the teacher cut to `keep` or `params`) on `data` under `objective`.

    `teacher` is a model here, the address of a server that gives the `top_k` most likely tokens, or a tuple of several
    teachers that teach together as `combine` says. With `teacher_cache` the student learns from a cache; then the
    teacher's weights may be missing. A server or a cache alone needs a `student`, since there is nothing to prune.

    `on_policy` is the share of documents whose completions the student samples in training; `rollout` is the method
    that chooses and samples them. Sampled tokens are compared with the teacher and never enter cross-entropy.

    With `train` only the parameters whose names match that regular expression are trained.

    With `draft_vocabulary` the folder says which tokens, the most frequent ones, the student scores when it drafts.

    The default objective is 0.7 cross-entropy + 0.3 forward KL. `objective="cross_entropy"` trains without a teacher's
    signals; the teacher then only measures.
    """

    kind: ClassVar[str] = "distill"
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text_objective(self.objective)
        check_size_options({"student": self.student, "keep": self.keep, "params": self.params})
        check_strategy(self.strategy)
        options = self.teacher_options
        if options.ensemble is not None:
            check_ensemble(self.objective, self.rollout_config, cache=self.teacher_cache)
        student = self.student
        for source in options.sources:
            check_teacher(source, self.objective, self.rollout_config, self.settings, student=student)
            student = student or source.location or source.cache  # the first teacher alone is pruned
        if options.route is not None and self.objective.language_column is not None:
            raise UsageError("--combine route reads one column, and language_routing another; omit one of them")
        check_top_k(self.top_k, options.sources)
        _ = self.long_documents
        check_lora_rank(self.lora)
        check_trained_names(self.train, lora=self.lora)
        check_sizes(self.sizes_per_step, self.sizes_from)
        check_documents(self.documents)
        check_draft_vocabulary(self.draft_vocabulary)
        check_save_dtype(self.save_dtype)
        for tracker in self.settings.report_to:
            check_tracker(tracker)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "DistillConfig":
        """The config with these options (of the command line, a YAML file or Python), and defaults for all others.

        Raises: UsageError if an option has an invalid value.
        """
        field_names = {name: field_name for name, field_name, _, _ in list_options(cls)}
        flat_options = {field_names.get(name, name): value for name, value in options.items()}
        objective = ObjectiveConfig.from_options(options)
        flat_options["report_to"] = tuple(flat_options.get("report_to") or ())
        if flat_options.get("epochs") is not None:
            flat_options["epochs"] = float(flat_options["epochs"])  # 2 in Python, 2.0 on the command line
        settings = TrainConfig(
            **{f.name: flat_options[f.name] for f in fields(TrainConfig) if flat_options.get(f.name) is not None}
        )
        if isinstance(teachers := flat_options.get("teacher"), list | tuple):
            flat_options["teacher"] = tuple(teachers) if len(teachers) > 1 else next(iter(teachers), None)
        if not isinstance(data := flat_options.get("data") or DATA.default, str):
            flat_options["data"] = tuple(data) if len(data) > 1 else data[0]
        else:
            flat_options["data"] = data
        names = {f.name for f in fields(cls)} - {"objective", "settings"}
        return cls(objective=objective, settings=settings, **{k: v for k, v in flat_options.items() if k in names})

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data."""
        return to_plain_dict(self)

    @cached_property
    def teacher_options(self) -> TeacherOptions:
        """The teachers and how they teach together."""
        return TeacherOptions.parse(self.teacher, self.combine, cache=self.teacher_cache, top_k=self.top_k)

    @property
    def teachers(self) -> tuple[TeacherSource, ...]:
        """The teachers; the first one measures, and is the one that is pruned."""
        return self.teacher_options.sources

    @property
    def long_documents(self) -> LongDocuments:
        """The choice of documents by their lengths."""
        return LongDocuments(self.min_document_tokens, self.short_share)

    @property
    def document_label(self) -> DocumentLabel | None:
        """The column of the data whose value each document carries: the name of its teacher, or of its language."""
        column = self.objective.language_column
        return self.teacher_options.route if column is None else Language(column)

    @property
    def rollout_config(self) -> RolloutConfig:
        """The method that samples completions in training, and their share."""
        return RolloutConfig(name=self.rollout, share=self.on_policy)

    @property
    def inputs(self) -> StageInputs:
        """Every model, cache and data set that a run reads; a cache may take the place of its teacher's weights."""
        return StageInputs(
            models=(self.student, *(source.location for source in self.teachers if source.cache is None)),
            data=(self.data, self.eval_data),
            folders=tuple(path for source in self.teachers if source.cache for path in (source.location, source.cache)),
            origin=self.student or self.teachers[0].location,
            share=1.0 if self.student else self.keep or 0.0,
        )
