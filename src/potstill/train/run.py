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

from potstill.core import backend
from potstill.core.errors import MissingDependency, UsageError
from potstill.train import checkpoint, ranks
from potstill.train.blocks import blocks_run
from potstill.train.progress import METRICS, Interrupt, Record, Show, peak_memory, read_metrics
from potstill.train.rollout import Rollout
from potstill.train.settings import Settings
from potstill.train.study import Study
from potstill.train.trainer import Trainer, arguments
from potstill.train.watch import Patience, exhausted


@dataclass(frozen=True, kw_only=True)
class Outcome:
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
    study: Study,
    packs: Any,
    settings: Settings,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    validation: Any = None,
    rollout: Rollout | None = None,
    identity: str = "",
    resume: bool = False,
    title: str = "training",
    show: bool = True,
) -> Outcome:
    """Train `study` in place on `packs`; checkpoints and `metrics.jsonl` go to `folder`.

    `rollout` writes the tokens of each step anew before they are counted; `rollout.tally` is what it says of them in
    `metrics.jsonl`. `identity` names the run (settings, models, data); a checkpoint of another identity is refused.

    Raises:
        ArtefactError: `resume` finds checkpoints but none that is whole and of this run, or one cannot be written.
        TrainingDiverged: the loss or a gradient is no finite number, or the loss explodes.
        UsageError, MissingDependency: evaluations without data, or a tracker that is not installed.
    """
    _check(settings, validation)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(study.student.parameters()).device.type
    args = arguments(settings, folder, device=device, ranks=ranks.count())
    callbacks: list[TrainerCallback] = [Record(folder / METRICS), interrupt := Interrupt()]
    if show and args.process_index == 0:
        callbacks.append(Show(title))
    if settings.patience:
        callbacks.append(Patience(settings.patience))
    quiet()
    trainer = Trainer(
        study,
        args,
        identity=identity,
        keep_best=bool(settings.patience),
        rollout=rollout,
        train_dataset=packs,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    last = checkpoint.latest(folder, study=identity, ranks=ranks.count()) if resume else None
    ranks.require_same("last checkpoint", str(last))
    with interrupt, backend.held_memory(), blocks_run(study, settings):
        try:
            _advance(trainer, last, settings)
        finally:
            for callback in callbacks:
                if isinstance(callback, Show):
                    callback.close()
    ranks.wait()  # rank 0 has written the last line
    finished = trainer.state.global_step >= args.max_steps or not interrupt.asked
    if finished and settings.patience:
        trainer.restore_best()
    return _outcome(trainer, finished=finished)


def _check(settings: Settings, validation: Any) -> None:
    if settings.eval_every and validation is None:
        raise UsageError(
            f"eval_every is {settings.eval_every}, but there is no evaluation data; give some, or set it to 0"
        )
    for tracker in settings.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise MissingDependency(f"report_to names {tracker}, which is not installed; run: pip install {tracker}")


def _advance(trainer: Trainer, last: Path | None, settings: Settings) -> None:
    """Trains to the end; from a checkpoint that is the end already, only takes what is there."""
    if last is not None:
        state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        if state.global_step >= trainer.args.max_steps or exhausted(state.log_history, settings.patience):
            trainer.restore(last, state)
            return
    trainer.train(resume_from_checkpoint=str(last) if last else None)


def identify(*facts: Any) -> str:
    """A short digest of everything that makes a run this run."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def quiet() -> None:
    """Silence the libraries' own progress; ours says the same in one line."""
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def metrics_of(folder: Path) -> list[dict[str, int | float]]:
    """The lines of `metrics.jsonl`."""
    return read_metrics(folder / METRICS)


def _outcome(trainer: Trainer, *, finished: bool) -> Outcome:
    lines = [line for line in metrics_of(Path(trainer.args.output_dir)) if "loss" in line]
    recent = lines[-max(1, len(lines) // 10) :]
    seconds, tokens = sum(line["seconds"] for line in lines), int(trainer.state.num_input_tokens_seen)
    return Outcome(
        finished=finished,
        steps=trainer.state.global_step,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        peak_memory=peak_memory(trainer.args.device.type),
        losses={name: statistics.fmean(line[name] for line in recent) for name in trainer.study.term_names},
    )
