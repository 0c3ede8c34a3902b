"""One training run, from a `TrainingModule` and packs to a trained student. It can be resumed at any step."""

import hashlib
import importlib.util
import json
import logging
import statistics
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from potstill.core.errors import MissingDependency, UsageError
from potstill.core.memory import get_peak_memory, retain_freed_memory
from potstill.core.metrics_log import METRICS_FILE, read_metrics
from potstill.core.screen import Verbosity, get_verbosity
from potstill.models.embedding_noise import check_embedding_noise
from potstill.train import checkpoint, distributed
from potstill.train.activation_checkpointing import apply_block_settings
from potstill.train.callbacks import (
    InterruptCallback,
    MetricsCallback,
    ProgressLineCallback,
)
from potstill.train.config import TrainConfig
from potstill.train.early_stopping import EarlyStopping, is_patience_exhausted
from potstill.train.fsdp import shard_for_training
from potstill.train.rollouts.steps import AnyRollout, get_updates
from potstill.train.trackers import open_logs
from potstill.train.trainer import Trainer
from potstill.train.training_arguments import make_training_arguments
from potstill.train.training_module import TrainingModule


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The cost of a run, and its last losses.

    `finished` is False if the run was interrupted before its end and can be resumed. `has_stop_request` if a signal
    came, be it in the last step. `seconds` counts training steps only, without evaluations and checkpoints, over all
    parts of a resumed run. `peak_memory` is in bytes. `losses` are the means of each term over the last tenth of the
    steps.
    """

    finished: bool
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    losses: dict[str, float]
    has_stop_request: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The cost as a plain dictionary, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "has_stop_request"}


def train(
    module: TrainingModule,
    packs: Any,
    config: TrainConfig,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: Any = None,
    rollout: AnyRollout | None = None,
    run_id: str = "",
    resume: bool = False,
    title: str = "training",
    show: bool = True,
) -> TrainResult:
    """Train `module` in place on `packs`; checkpoints and `metrics.jsonl` go to `folder`.

    `rollout` replaces tokens of each step before they are counted; its tally goes to `metrics.jsonl`. `run_id`
    identifies settings, models and data; it refuses a checkpoint with another id.

    Raises:
        ArtifactError: `resume` finds checkpoints, but none is whole and of this run; or one cannot be written.
        TrainingDiverged: the loss or a gradient is not finite, or the loss explodes.
        UsageError, MissingDependency: evaluations without data, or a tracker that is not installed.
    """
    _check_inputs(config, validation)
    if config.neftune:
        check_embedding_noise(module.student)
    config = config.resolve_epochs(len(packs), updates=get_updates(rollout))
    folder.mkdir(parents=True, exist_ok=True)
    silence_libraries()
    interrupt = InterruptCallback()
    progress = ProgressLineCallback(title, is_shown=show and distributed.is_main_process())
    trackers = config.report_to if distributed.is_main_process() else ()
    with open_logs(trackers, folder, title=title), shard_for_training(module, config) as trained_module:
        trainer = _build_trainer(
            trained_module,
            config,
            folder,
            callbacks=[MetricsCallback(folder / METRICS_FILE), interrupt, progress],
            run_id=run_id,
            rollout=rollout,
            train_dataset=packs,
            eval_dataset=validation,
            processing_class=tokenizer,
        )
        last_checkpoint = _find_last_checkpoint(folder, run_id) if resume else None
        distributed.check_same_on_all_ranks("last checkpoint", str(last_checkpoint))
        with interrupt, closing(progress), retain_freed_memory(), apply_block_settings(trained_module, config):
            _train_or_restore(trainer, last_checkpoint, config)
        distributed.barrier()  # rank 0 has written the last line
        finished = trainer.state.global_step >= trainer.args.max_steps or not interrupt.is_requested
        if finished and config.patience:
            trainer.restore_best()
    return _make_result(trainer, finished=finished, has_stop_request=interrupt.is_requested)


def _build_trainer(
    module: TrainingModule, config: TrainConfig, folder: Path, *, callbacks: list[TrainerCallback], **options: Any
) -> Trainer:
    device = next(module.student.parameters()).device.type
    args = make_training_arguments(config, folder, device=device, world_size=distributed.world_size())
    if config.patience:
        callbacks = [*callbacks, EarlyStopping(config.patience)]
    keep_checkpoints = max(checkpoint.MIN_CHECKPOINTS, config.keep_checkpoints)
    options |= {"keep_best": bool(config.patience), "keep_checkpoints": keep_checkpoints, "neftune": config.neftune}
    return Trainer(module, args, callbacks=callbacks, **options)


def _find_last_checkpoint(folder: Path, run_id: str) -> Path | None:
    return checkpoint.find_latest_checkpoint(folder, run_id=run_id, world_size=distributed.world_size())


def _check_inputs(config: TrainConfig, validation: Any) -> None:
    if config.eval_every and validation is None:
        raise UsageError(
            f"eval_every is {config.eval_every}, but there is no evaluation data; give some, or set it to 0"
        )
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise MissingDependency(f"report_to names {tracker}, which is not installed; run: pip install {tracker}")


def _train_or_restore(trainer: Trainer, last_checkpoint: Path | None, config: TrainConfig) -> None:
    """Trains to the end, or only loads a checkpoint that was saved at the end."""
    if last_checkpoint is not None:
        state = TrainerState.load_from_json(str(last_checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= trainer.args.max_steps or is_patience_exhausted(state.log_history, config.patience):
            trainer.restore(last_checkpoint, state)
            return
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)


def compute_run_id(*facts: Any) -> str:
    """A short digest of all settings, models and data of a run."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def silence_libraries() -> None:
    """Silence the progress bars and warnings of Hugging Face's libraries, except with --verbose."""
    if get_verbosity() is Verbosity.VERBOSE:
        return
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def read_run_metrics(folder: Path) -> list[dict[str, int | float]]:
    """The lines of `metrics.jsonl` in `folder`, as plain data."""
    return read_metrics(folder / METRICS_FILE)


def _make_result(trainer: Trainer, *, finished: bool, has_stop_request: bool) -> TrainResult:
    lines = [line for line in read_run_metrics(Path(trainer.args.output_dir)) if "loss" in line]
    recent = lines[-max(1, len(lines) // 10) :]
    seconds, tokens = sum(line["seconds"] for line in lines), int(trainer.state.num_input_tokens_seen)
    return TrainResult(
        finished=finished,
        steps=trainer.state.global_step,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        peak_memory=get_peak_memory(trainer.args.device),
        losses={name: statistics.fmean(line[name] for line in recent) for name in trainer.training_module.term_names},
        has_stop_request=has_stop_request,
    )
