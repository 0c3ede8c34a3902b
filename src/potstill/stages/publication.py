"""Publishes a trained student: first the model, then what the card says about it.

The model is in `out` before anything is measured, with `out`/training beside it. Measures, samples and the picture of
the loss follow. The card names those that fail; nothing else is lost. Then `out`/training goes. A process that is
killed in between leaves a model that opens, and --resume makes the rest.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from potstill.core.atomic_files import TRAINING_FOLDER, atomic_folder, remove_inner_folder
from potstill.core.card import BEFORE_TRAINING, MISSING_MEASURES, Card
from potstill.core.errors import DataError
from potstill.core.measure import Measure
from potstill.core.metrics_log import METRICS_FILE
from potstill.core.notes import print_note
from potstill.core.screen import status
from potstill.evaluate.charts.curve import draw_curve
from potstill.stages.console import attempt, get_command
from potstill.stages.model_card import write_card
from potstill.stages.run_folder import explain_interrupt
from potstill.stages.training_run import TrainingRun
from potstill.train import distributed
from potstill.train.checkpoint import list_checkpoints
from potstill.train.run import TrainResult
from potstill.train.trackers import LOGS_FOLDER, describe_log

CURVE_FILE, CHECKPOINTS_FOLDER = "curve.png", "checkpoints"


def publish(
    run: TrainingRun,
    out: Path,
    student: PreTrainedModel,
    result: TrainResult,
    baseline: Sequence[Measure],
    checks: Sequence[Mapping[str, str]],
) -> Card:
    """Save the trained student to `out`, then measure it and complete its card; other ranks wait for the card.

    Raises: Interrupted for a signal that came since the last step began; the student is in `out`.
    """
    card = make_card(run, result, checks)
    if distributed.is_main_process():
        with status("saving the model"):
            card = save_student(run, out, student, card)
        with explain_interrupt(out, saved="the student", rest="measures it"), status(run.measuring_status):
            if result.has_stop_request:
                raise KeyboardInterrupt
            card = complete_card(run, out, student, result, baseline, card)
        remove_inner_folder(out / TRAINING_FOLDER)
        for tracker in run.config.settings.report_to:
            print_note(describe_log(tracker, out))
    published_card: Card = distributed.broadcast_from_main(card)
    return published_card


def make_card(run: TrainingRun, result: TrainResult, checks: Sequence[Mapping[str, str]]) -> Card:
    """The card of a student that is not measured yet."""
    return Card(
        stage=run.config.to_dict(),
        seed=run.config.settings.seed,
        parents=run.parents,
        data=run.data,
        cost=result.to_dict(),
        invariants=checks,
        details=run.details,
        failures=MISSING_MEASURES,
        command=get_command(),
    )


def save_student(run: TrainingRun, out: Path, student: PreTrainedModel, card: Card) -> Card:
    """Put the model into `out`, whole or not at all; its card, with the result of opening the model again."""
    with atomic_folder(out, overwrite=True, carry=TRAINING_FOLDER) as folder:
        card = dataclasses.replace(card, invariants=[*card.invariants, run.save(student, folder)])
        copy_logs(out / TRAINING_FOLDER, folder)
        copy_checkpoints(out / TRAINING_FOLDER, folder, keep=run.config.settings.keep_checkpoints)
        write_card(folder, card, title=out.name)
    return card


def copy_logs(training: Path, folder: Path) -> None:
    """Copy the metrics and the logs of trackers from the folder of a run."""
    for file in training.glob("*.jsonl"):
        shutil.copy(file, folder / file.name)
    if (training / LOGS_FOLDER).is_dir():
        shutil.copytree(training / LOGS_FOLDER, folder / LOGS_FOLDER, symlinks=True)


def copy_checkpoints(training: Path, folder: Path, *, keep: int) -> None:
    """Copy the newest `keep` checkpoints of a run to `folder`/checkpoints; links take no room and no time."""
    for checkpoint in list_checkpoints(training)[:keep]:
        shutil.copytree(checkpoint, folder / CHECKPOINTS_FOLDER / checkpoint.name, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def complete_card(
    run: TrainingRun,
    out: Path,
    student: PreTrainedModel,
    result: TrainResult,
    baseline: Sequence[Measure],
    card: Card,
) -> Card:
    """Measure the student in `out`, let it write samples, draw its losses; write the card with what succeeds."""
    loaded = dataclasses.replace(run.origin, model=student, name=out.name, path=out, note="")
    failures: dict[str, str] = {}
    unmeasured: Mapping[str, Sequence[Measure]] = {}
    measures = attempt("measures", lambda: run.measure(loaded), unmeasured, failures)
    samples = attempt("samples", lambda: run.write_samples(loaded), "", failures)
    curve = attempt("picture of the loss", lambda: draw_loss_curve(out, result), "", failures)
    teacher_measures = {"teacher": measures["teacher"]} if "teacher" in measures else {}
    card = dataclasses.replace(
        card, measures={**teacher_measures, BEFORE_TRAINING: baseline, **measures}, failures=failures
    )
    write_card(out, card, title=out.name, samples=samples, curve=curve)
    return card


def draw_loss_curve(out: Path, result: TrainResult) -> str:
    """Draw `curve.png` of the losses; its name, or an empty string where there are too few points."""
    terms = list(result.losses) if len(result.losses) == 1 else ["loss", *result.losses]
    terms += [f"eval_{term}" for term in terms]
    with contextlib.suppress(DataError):
        draw_curve(out / METRICS_FILE, out / CURVE_FILE, terms=terms, title=out.name)
    return CURVE_FILE if (out / CURVE_FILE).exists() else ""
