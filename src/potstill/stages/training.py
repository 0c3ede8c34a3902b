"""The one training stage: reserve the folder, prepare, warn, rehearse, measure the baseline, check, train, publish.

Every job that trains a model is a config and a `TrainingRun`; distillation is `stages/distill`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from potstill.core.atomic_files import write_text
from potstill.core.card import BEFORE_TRAINING, Card
from potstill.core.device import SAVE_DTYPES
from potstill.core.measure import Measure
from potstill.core.results import MeasureTable, ModelMeasures
from potstill.core.screen import open_screen, status
from potstill.models.saving import round_weights
from potstill.stages.console import explain_write_errors
from potstill.stages.publication import publish
from potstill.stages.rehearsal import rehearse
from potstill.stages.run_folder import explain_interrupt, reserve_output, training_folder
from potstill.stages.run_notes import report_outcome
from potstill.stages.run_record import RunRecord
from potstill.stages.training_run import TrainingConfig, TrainingRun
from potstill.train import distributed
from potstill.train.lora import get_adapter_weights, merge_adapters
from potstill.train.run import TrainResult, train

BASELINE_FILE = "before.json"  # the measures of the student before training, kept for a resumed run


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingResult:
    """A finished run: its folder and card, the trained model and its tokenizer, and the measures by model name."""

    out: Path
    card: Card
    model: PreTrainedModel
    tokenizer: Any

    @property
    def measures(self) -> MeasureTable:
        """The measures of the card by model name, which prints as a table."""
        return MeasureTable(self.card.measures)

    @property
    def student(self) -> ModelMeasures:
        """The measures of the student: `run.student.bits_per_byte.value`."""
        return self.measures[self.out.name]

    @property
    def teacher(self) -> ModelMeasures:
        """The measures of the teacher."""
        return self.measures["teacher"]

    @property
    def before_training(self) -> ModelMeasures:
        """The measures of the student before training."""
        return self.measures[BEFORE_TRAINING]

    def __repr__(self) -> str:
        return f"{self.out}\n{self.measures!r}"

    def _repr_html_(self) -> str:
        return self.measures._repr_html_()

    def to_dict(self) -> dict[str, Any]:
        """The folder and its card, for JSON."""
        return {"out": str(self.out), **self.card.to_dict()}


def run_training(
    config: TrainingConfig,
    prepare: Callable[[Path | None], TrainingRun],
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    show: bool = True,
) -> TrainingResult:
    """Carry out a job: `out` appears whole at the end, and holds `training/` alone until then.

    `prepare` reads models and data; it gets the folder of the run that is resumed, or None.

    Raises:
        UsageError, NotFound, VocabularyMismatch, OutputExists: before anything is written.
        TrainingDiverged, Interrupted, ArtifactError: checkpoints stay in `out`/training for --resume.
    """
    with distributed.process_group():
        show = show and distributed.is_main_process()
        with (
            open_screen(show=show),
            reserve_output(out, config.inputs, overwrite=overwrite, resume=resume, options=config.to_dict()),
        ):
            run = prepare(out if resume else None)
            run.warn_if_insufficient(out, show=show)
            check_same_run(run)
            with (
                run.connections(),
                explain_write_errors(out),
                explain_interrupt(out),
                training_folder(out, run.record, overwrite=overwrite) as folder,
            ):
                rehearse(run, title=out.name)
                baseline = evaluate_baseline(run, folder)
                checks = run.run_checks()
                result = train_model(run, folder, title=out.name, resume=resume, show=show)
                student = export_student(run)
                card = publish(run, out, student, result, baseline, checks)
        tokens = 0 if run.rollout else config.settings.count_tokens(run.data["tokens"])  # samples have any length
        report_outcome(tokens, result.tokens, card.measures, student=out.name, prefers_chosen=run.prefers_chosen)
    return TrainingResult(out=out, card=card, model=student, tokenizer=run.origin.tokenizer)


def check_same_run(run: TrainingRun) -> None:
    """Refuse ranks that differ in options, data or weights.

    Raises: ArtifactError.
    """
    distributed.check_same_on_all_ranks("settings, models or text", run.record.run_id)
    weights_digest = distributed.hash_weights(run.module.student) if distributed.world_size() > 1 else ""
    distributed.check_same_on_all_ranks("student", weights_digest)


def evaluate_baseline(run: TrainingRun, folder: Path) -> list[Measure]:
    """The measures of the student before training, from `folder` where a resumed run left them; none on other ranks."""
    file = folder / BASELINE_FILE
    if not distributed.is_main_process():
        return []
    if file.is_file():
        return [Measure(**measure) for measure in json.loads(file.read_text(encoding="utf-8"))]
    with status(f"{run.measuring_status} before training"):
        measures = run.measure_baseline()
    write_text(file, json.dumps([measure.to_dict() for measure in measures]))
    return measures


def train_model(run: TrainingRun, folder: Path, *, title: str, resume: bool, show: bool) -> TrainResult:
    """Train to the end, or raise KeyboardInterrupt once an interrupted run has saved its checkpoint."""
    run.release_memory()
    record = RunRecord.from_folder(folder) if distributed.is_main_process() else None
    result = train(
        run.module,
        run.packs,
        run.config.settings,
        folder,
        tokenizer=run.origin.tokenizer,
        validation=run.validation,
        rollout=run.rollout,
        run_id=distributed.broadcast_from_main((record or run.record).run_id),
        resume=resume,
        title=title,
        show=show,
    )
    if not result.finished:
        raise KeyboardInterrupt
    return result


def export_student(run: TrainingRun) -> PreTrainedModel:
    """The trained student as a stock model: adapters merged, weights rounded to the dtype of the saved folder.

    It is measured after this, so that the measures are those of the saved model.
    """
    model = run.module.student
    student: PreTrainedModel = run.student if get_adapter_weights(model) is None else merge_adapters(model)
    round_weights(student, SAVE_DTYPES[run.config.save_dtype])
    return student.eval()
