"""The one training stage: check the folder, prepare, warn, measure the baseline, check, train, publish.

Every job that trains a model is a config and a `TrainingRun`; distillation is `stages/distill`.
"""

import contextlib
import dataclasses
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from potstill.core.atomic_files import TRAINING_FOLDER, atomic_folder, write_text
from potstill.core.card import Card, Parent
from potstill.core.device import get_dtype_name
from potstill.core.errors import DataError
from potstill.core.metrics_log import METRICS_FILE
from potstill.core.types import Measure
from potstill.evaluate.charts.plots import draw_curve
from potstill.models.load import LoadedModel
from potstill.stages.console import explain_write_errors, get_command, show_status
from potstill.stages.model_card import write_card
from potstill.stages.run_folder import DTYPE_FILE, check_output_folder, explain_interrupt, training_folder
from potstill.stages.saved_model import save_checked_model
from potstill.stages.stage import reproducible_options
from potstill.train import distributed
from potstill.train.config import TrainConfig
from potstill.train.lora import get_adapter_weights, merge_adapters
from potstill.train.rollouts.base import Rollout
from potstill.train.run import TrainResult, compute_run_id, train
from potstill.train.training_module import TrainingModule

BASELINE_FILE = "before.json"  # the measures of the student before training, kept for a resumed run
BEFORE_TRAINING = "before training"  # the name of these measures in a card
CURVE_FILE = "curve.png"


@runtime_checkable
class TrainingConfig(Protocol):
    """The options of a job: how to train, what it reads, and all of it as plain data."""

    @property
    def settings(self) -> TrainConfig: ...
    @property
    def inputs(self) -> tuple[str | None, ...]: ...
    @property
    def trust_remote_code(self) -> bool: ...
    def to_dict(self) -> dict[str, Any]: ...


class Evaluation(NamedTuple):
    """The measures of each model by its name, and what the models write after some prompts, as Markdown."""

    measures: Mapping[str, Sequence[Measure]]
    samples: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingRun(ABC):
    """A job with its models and data in memory; nothing is on disk yet.

    `student` is the model that `module` trains, which may carry adapters there; `origin` is the model that it came
    from. `data` and `details` describe the text and the student in the card. `run_facts` are what else a run has to
    agree on to be resumed.
    """

    config: TrainingConfig
    module: TrainingModule
    student: PreTrainedModel
    origin: LoadedModel
    packs: Any
    validation: Any
    dtype: torch.dtype
    parents: Sequence[Parent]
    data: Mapping[str, Any]
    data_digest: str
    details: Mapping[str, Any] = field(default_factory=dict)
    run_facts: Mapping[str, Any] = field(default_factory=dict)
    rollout: Rollout | None = None

    @property
    def run_id(self) -> str:
        """A digest of everything that makes this run; a checkpoint of another run is refused."""
        options, digests = reproducible_options(self.config.to_dict()), [parent.digest for parent in self.parents]
        return compute_run_id(options, digests, self.data_digest, self.details, self.run_facts)

    @property
    @abstractmethod
    def measuring_status(self) -> str:
        """The line that is shown while the models are measured."""

    @abstractmethod
    def connections(self) -> AbstractContextManager[None]:
        """A context that closes what the run holds open."""

    @abstractmethod
    def warn_if_insufficient(self, out: Path, *, show: bool) -> None:
        """Print what the run takes, and whether the machine has it. Raises: ArtifactError for a full disk."""

    @abstractmethod
    def measure_baseline(self) -> list[Measure]:
        """The quality of the student before training."""

    @abstractmethod
    def run_checks(self) -> list[dict[str, str]]:
        """The checks before training, as records for the card. Raises: CheckFailed."""

    def release_memory(self) -> None:
        """Give back memory that training does not need."""
        return

    @abstractmethod
    def evaluate(self, student: LoadedModel) -> Evaluation:
        """The measures and samples of the trained student, and of what it is compared with."""

    def save(self, student: PreTrainedModel, folder: Path) -> dict[str, str]:
        """Write the student to `folder`; the record that says whether it reloads to the same logits."""
        return save_checked_model(student, self.origin, folder, trust_remote_code=self.config.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished run: its folder and card, the trained model and its tokenizer, and the measures by model name."""

    out: Path
    card: Card
    model: PreTrainedModel
    tokenizer: Any
    measures: Mapping[str, Sequence[Measure]]

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
        check_output_folder(out, *config.inputs, overwrite=overwrite, resume=resume)
        run = prepare(out if resume else None)
        run.warn_if_insufficient(out, show=show)
        check_same_run(run)
        with (
            run.connections(),
            explain_write_errors(out),
            explain_interrupt(out),
            training_folder(out, overwrite=overwrite, marker=(DTYPE_FILE, get_dtype_name(run.dtype))) as folder,
        ):
            baseline = evaluate_baseline(run, folder, show=show)
            checks = run.run_checks()
            result = train_model(run, folder, title=out.name, resume=resume, show=show)
            return publish(run, out, result, baseline, checks, show=show)


def check_same_run(run: TrainingRun) -> None:
    """Refuse ranks that differ in options, data or weights.

    Raises: ArtifactError.
    """
    distributed.check_same_on_all_ranks("settings, models or text", run.run_id)
    weights_digest = distributed.hash_weights(run.module.student) if distributed.world_size() > 1 else ""
    distributed.check_same_on_all_ranks("student", weights_digest)


def evaluate_baseline(run: TrainingRun, folder: Path, *, show: bool) -> list[Measure]:
    """The measures of the student before training, from `folder` where a resumed run left them; none on other ranks."""
    file = folder / BASELINE_FILE
    if not distributed.is_main_process():
        return []
    if file.is_file():
        return [Measure(**measure) for measure in json.loads(file.read_text(encoding="utf-8"))]
    with show_status(f"{run.measuring_status} before training", show=show):
        measures = run.measure_baseline()
    write_text(file, json.dumps([measure.to_dict() for measure in measures]))
    return measures


def train_model(run: TrainingRun, folder: Path, *, title: str, resume: bool, show: bool) -> TrainResult:
    """Train to the end, or raise KeyboardInterrupt once an interrupted run has saved its checkpoint."""
    run.release_memory()
    result = train(
        run.module,
        run.packs,
        run.config.settings,
        folder,
        tokenizer=run.origin.tokenizer,
        validation=run.validation,
        rollout=run.rollout,
        run_id=run.run_id,
        resume=resume,
        title=title,
        show=show,
    )
    if not result.finished:
        raise KeyboardInterrupt
    return result


def publish(
    run: TrainingRun,
    out: Path,
    result: TrainResult,
    baseline: Sequence[Measure],
    checks: Sequence[Mapping[str, str]],
    *,
    show: bool,
) -> TrainingResult:
    """Save and measure the trained student, and write its card; other ranks wait for the result."""
    model = run.module.student
    student = (run.student if get_adapter_weights(model) is None else merge_adapters(model)).eval()
    published = None
    if distributed.is_main_process():
        with show_status(run.measuring_status, show=show):
            published = _write_folder(run, out, student, result, baseline, checks)
    card, measures = distributed.broadcast_from_main(published)
    return TrainingResult(out=out, card=card, model=student, tokenizer=run.origin.tokenizer, measures=measures)


def _write_folder(
    run: TrainingRun,
    out: Path,
    student: PreTrainedModel,
    result: TrainResult,
    baseline: Sequence[Measure],
    checks: Sequence[Mapping[str, str]],
) -> tuple[Card, Mapping[str, Sequence[Measure]]]:
    with atomic_folder(out, overwrite=True) as folder:
        reload_record = run.save(student, folder)
        for file in (out / TRAINING_FOLDER).glob("*.jsonl"):
            shutil.copy(file, folder / file.name)
        evaluation = run.evaluate(dataclasses.replace(run.origin, model=student, name=out.name, path=folder, note=""))
        measures = {**evaluation.measures}
        teacher_measures = {"teacher": measures["teacher"]} if "teacher" in measures else {}
        measures = {**teacher_measures, BEFORE_TRAINING: baseline, **measures}
        card = Card(
            stage=run.config.to_dict(),
            seed=run.config.settings.seed,
            parents=run.parents,
            data=run.data,
            cost=result.to_dict(),
            measures=measures,
            invariants=[*checks, reload_record],
            details=run.details,
            command=get_command(),
        )
        curve = _draw_loss_curve(folder, result)
        write_card(folder, card, title=out.name, samples=evaluation.samples, curve=curve)
    return card, measures


def _draw_loss_curve(folder: Path, result: TrainResult) -> str:
    """Draw `curve.png`; its name, or an empty string where there are too few points."""
    terms = list(result.losses)
    with contextlib.suppress(DataError):
        draw_curve(folder / METRICS_FILE, folder / CURVE_FILE, terms=[*terms, *(f"eval_{term}" for term in terms)])
    return CURVE_FILE if (folder / CURVE_FILE).exists() else ""
