"""Measures several models on the same documents, with a teacher that runs once."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.atomic_files import write_text
from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.errors import UsageError
from potstill.core.output_lock import output_lock
from potstill.data.corpus import Corpus
from potstill.evaluate.lm_eval_harness import run_tasks
from potstill.evaluate.measures import (
    ModelEvaluation,
    TextScores,
    compute_paired_differences,
    measure_quality,
    measure_rouge,
    measure_size,
    measure_speed,
)
from potstill.evaluate.perplexity import score
from potstill.evaluate.rouge import Question, build_questions, score_answers
from potstill.evaluate.scoring_windows import Row, ScoringConfig, check_context
from potstill.evaluate.teacher_reference import TeacherReference
from potstill.models.load import LoadedModel, load_model
from potstill.models.tokenizers.vocabulary import count_token_ids
from potstill.stages.console import print_note
from potstill.stages.corpus import load_data
from potstill.stages.dataset import build_rows, compute_measured_digest
from potstill.stages.measure_long_context import (
    check_inputs,
    check_lengths,
    describe_long_context,
    draw_result,
    evaluate_long_context,
)
from potstill.stages.measure_preferences import measure_preferences
from potstill.stages.options import MeasureOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.stage import to_plain_dict
from potstill.stages.text_options import make_rendering, prepare_tokenizer


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(MeasureOptions):
    """Measure `models` on the documents of one `split` of `data`, and compare them with `teacher` if given.

    Each model reads chats in its own chat template, of which only the answers and their ends are scored. KL and
    agreement are measured in the teacher's template.

    The measures are bits per byte and perplexity; with a teacher of the same tokenizer KL, agreement and acceptance;
    ROUGE-L for data with prompts; parameters and bytes; tokens/s unless `speed` is off; and the lm-eval `tasks`. With
    `positions` and `needle` it measures how the models use a long context. With a `reference` the data are preferences,
    and the measures say how the models rank their answers.
    """

    kind: ClassVar[str] = "measurement"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.documents < 1:
            raise UsageError(f"--documents is {self.documents}; it must be at least 1")
        check_lengths(self)
        if self.reference is not None and (self.teacher or self.positions or self.needle or self.tasks):
            raise UsageError(
                "--reference measures preferences alone; omit --teacher, --positions, --needle and --tasks"
            )
        if duplicates := [n for n in self.models if self.models.count(n) > 1]:
            raise UsageError(f"{duplicates[0]} is named twice; name each model once")

    def to_dict(self) -> dict[str, Any]:
        """The options of the stage as plain data."""
        return to_plain_dict(self)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads, and the package that it needs."""
        packages = ("lm_eval",) if self.tasks else ()
        models = (*self.models, self.teacher, self.reference)
        return StageInputs(models=models, data=(self.data,), packages=packages)

    def run(self, out: Path | None = None) -> dict[str, Any]:
        """`{"models": {NAME: [measures]}, "paired": [...], "data": {...}}`, also written to `out` if given.

        With `positions` and `needle` it has tables of these names; a chart of them is written next to `out`.
        """
        self.inputs.check()
        if out is None:
            return self._measure()
        with output_lock(out):
            result = self._measure()
            write_text(out, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
            draw_result(result, out.with_suffix(".png"))
        return result

    def _measure(self) -> dict[str, Any]:
        if self.reference is not None:
            return measure_preferences(self, self.to_dict())
        corpus = load_data(self, split=self.split)
        evaluations = self.evaluate_models(corpus)
        return {
            "models": {name: [m.to_dict() for m in evaluation.measures] for name, evaluation in evaluations.items()},
            "paired": compute_paired_differences(
                {name: evaluation.text_scores for name, evaluation in evaluations.items()}
            ),
            **describe_long_context(evaluations),
            "data": self._describe_data(corpus),
            "stage": self.to_dict(),
        }

    def evaluate_models(self, corpus: Corpus) -> dict[str, ModelEvaluation]:
        """The evaluation of every model on `corpus`, by name; `data` and `split` are not used."""
        teacher = None if self.teacher is None else self._load_model(self.teacher)
        reference = None if teacher is None else self._read_teacher(teacher, corpus)
        evaluations: dict[str, ModelEvaluation] = {}
        for number, name in enumerate(self.models, 1):
            print_note(f"measuring model {number} of {len(self.models)}: {name}")
            loaded = teacher if teacher is not None and name == self.teacher else self._load_model(name)
            check_inputs(self, corpus, loaded.model)
            rows = reference.rows if reference is not None and loaded is teacher else self._build_rows(corpus, loaded)
            scores: TextScores
            if reference is None:
                scores = score(loaded.model, rows, self.build_reading(count_token_ids(loaded.tokenizer)))
            else:
                scores = reference.compare(loaded, rows)
            evaluations[name] = self._evaluate_model(scores, loaded, corpus)
        return evaluations

    def _read_teacher(self, teacher: LoadedModel, corpus: Corpus) -> TeacherReference:
        """The teacher with its rows, in its own chat template."""
        check_context(self.context, teacher.model)
        rows, reading = self._build_rows(corpus, teacher), self.build_reading(count_token_ids(teacher.tokenizer))
        has_template = corpus.kind != "text" and bool(teacher.tokenizer.chat_template)
        return TeacherReference(teacher, rows, reading, has_template=has_template)

    def _describe_data(self, corpus: Corpus) -> dict[str, Any]:
        """The text for the result; `measured_digest` is that of the documents which were measured."""
        only_last = make_rendering(self).only_last
        measured_digest = compute_measured_digest(corpus, documents=self.documents, only_last=only_last)
        facts = {"name": corpus.name, "digest": corpus.digest, "documents": self.documents}
        return {**facts, "measured_digest": measured_digest, **corpus.provenance}

    def build_reading(self, vocabulary: int) -> ScoringConfig:
        """How the documents are scored."""
        dtype = resolve_dtype(self.dtype, device_type=str(resolve_device(self.device)))
        return ScoringConfig(context=self.context, vocabulary=vocabulary, dtype=dtype)

    def _load_model(self, name: str) -> LoadedModel:
        loaded = load_model(
            name,
            device=resolve_device(self.device),
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )
        prepare_tokenizer(loaded.tokenizer, self)
        return loaded

    def _build_rows(self, corpus: Corpus, loaded: LoadedModel) -> Sequence[Row]:
        return build_rows(corpus, loaded.tokenizer, documents=self.documents, rendering=make_rendering(self))

    def _build_questions(self, corpus: Corpus, loaded: LoadedModel) -> list[Question]:
        if corpus.kind == "text" or not self.prompts:
            return []
        return build_questions(corpus, loaded.tokenizer, limit=self.prompts, special_in_text=self.special_in_text)

    def _evaluate_model(self, scores: TextScores, loaded: LoadedModel, corpus: Corpus) -> ModelEvaluation:
        measures, answers = measure_quality(scores), None
        prompt_questions = self._build_questions(corpus, loaded)
        if prompt_questions:
            answers = score_answers(loaded.model, loaded.tokenizer, prompt_questions)
            measures.append(measure_rouge(answers))
        long_context, long_measures = evaluate_long_context(
            loaded, corpus, self, self.build_reading(count_token_ids(loaded.tokenizer))
        )
        measures += [*long_measures, *measure_size(loaded)]
        if self.speed:
            measures += measure_speed(loaded)
        if self.tasks:
            measures += run_tasks(loaded.model, loaded.tokenizer, self.tasks)
        return ModelEvaluation(measures, scores, answers, long_context)
