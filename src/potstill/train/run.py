"""One training run, from a study and packs to a trained student, resumable at any step."""

import hashlib
import importlib.util
import json
import logging
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from potstill.core.errors import MissingDependency, UsageError
from potstill.core.memory import get_peak_memory, retain_freed_memory
from potstill.core.metrics_log import METRICS_FILE, read_metrics
from potstill.train import checkpoint, distributed
from potstill.train.activation_checkpointing import apply_block_settings
from potstill.train.callbacks import (
    InterruptCallback,
    MetricsCallback,
    ProgressLineCallback,
)
from potstill.train.config import TrainConfig
from potstill.train.early_stopping import EarlyStopping, is_patience_exhausted
from potstill.train.rollouts.base import Rollout
from potstill.train.trainer import Trainer, make_training_arguments
from potstill.train.training_module import TrainingModule


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run cost and where it ended.

    `finished` is False if it was interrupted before its end and can be resumed. `seconds` is the time in training
    steps, of all parts of a resumed run, without evaluations and checkpoints. `losses` are the means of each term over
    the last tenth of the steps.
    """

    finished: bool
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    losses: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, for JSON."""
        return asdict(self)


def train(
    module: TrainingModule,
    packs: Any,
    config: TrainConfig,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: Any = None,
    rollout: Rollout | None = None,
    run_id: str = "",
    resume: bool = False,
    title: str = "training",
    show: bool = True,
) -> TrainResult:
    """Train `study` in place on `packs`; checkpoints and `metrics.jsonl` go to `folder`.

    `rollout` writes the tokens of each step anew before they are counted; `rollout.tally` is what it says of them in
    `metrics.jsonl`. `identity` names the run (settings, models, data); a checkpoint of another identity is refused.

    Raises:
        ArtefactError: `resume` finds checkpoints but none that is whole and of this run, or one cannot be written.
        TrainingDiverged: the loss or a gradient is no finite number, or the loss explodes.
        UsageError, MissingDependency: evaluations without data, or a tracker that is not installed.
    """
    _check_inputs(config, validation)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(module.student.parameters()).device.type
    args = make_training_arguments(config, folder, device=device, world_size=distributed.world_size())
    callbacks: list[TrainerCallback] = [MetricsCallback(folder / METRICS_FILE), interrupt := InterruptCallback()]
    if show and args.process_index == 0:
        callbacks.append(ProgressLineCallback(title))
    if config.patience:
        callbacks.append(EarlyStopping(config.patience))
    silence_libraries()
    trainer = Trainer(
        module,
        args,
        run_id=run_id,
        keep_best=bool(config.patience),
        rollout=rollout,
        train_dataset=packs,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    last_checkpoint = (
        checkpoint.find_latest_checkpoint(folder, run_id=run_id, world_size=distributed.world_size())
        if resume
        else None
    )
    distributed.check_same_on_all_ranks("last checkpoint", str(last_checkpoint))
    with interrupt, retain_freed_memory(), apply_block_settings(module, config):
        try:
            _train_or_restore(trainer, last_checkpoint, config)
        finally:
            for callback in callbacks:
                if isinstance(callback, ProgressLineCallback):
                    callback.close()
    distributed.barrier()  # rank 0 has written the last line
    finished = trainer.state.global_step >= args.max_steps or not interrupt.is_requested
    if finished and config.patience:
        trainer.restore_best()
    return _make_result(trainer, finished=finished)


def _check_inputs(config: TrainConfig, validation: Any) -> None:
    if config.eval_every and validation is None:
        raise UsageError(
            f"eval_every is {config.eval_every}, but there is no evaluation data; give some, or set it to 0"
        )
    for tracker in config.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise MissingDependency(f"report_to names {tracker}, which is not installed; run: pip install {tracker}")


def _train_or_restore(trainer: Trainer, last_checkpoint: Path | None, config: TrainConfig) -> None:
    """Trains to the end; from a checkpoint that is the end already, only takes what is there."""
    if last_checkpoint is not None:
        state = TrainerState.load_from_json(str(last_checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= trainer.args.max_steps or is_patience_exhausted(state.log_history, config.patience):
            trainer.restore(last_checkpoint, state)
            return
    trainer.train(resume_from_checkpoint=str(last_checkpoint) if last_checkpoint else None)


def compute_run_id(*facts: Any) -> str:
    """A short digest of everything that makes a run this run."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def silence_libraries() -> None:
    """Silence the libraries' own progress; ours says the same in one line."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def read_run_metrics(folder: Path) -> list[dict[str, int | float]]:
    """The lines of `metrics.jsonl`."""
    return read_metrics(folder / METRICS_FILE)


def _make_result(trainer: Trainer, *, finished: bool) -> TrainResult:
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
    )
