"""One training run, from a study and packs to a trained student, resumable at any step."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, TrainerCallback

from potstill.train import checkpoint
from potstill.train.progress import METRICS, Interrupt, Record, Show, peak_memory
from potstill.train.settings import Settings
from potstill.train.study import Study
from potstill.train.trainer import Trainer, arguments


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run cost and where it ended; `finished` is False if it was interrupted and can be resumed."""

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
    identity: str = "",
    resume: bool = False,
    title: str = "training",
    show: bool = True,
) -> Outcome:
    """Train `study` in place on `packs`; checkpoints and `metrics.jsonl` go to `folder`.

    `identity` names the run (settings, models, data); a checkpoint of another identity is refused.

    Raises: ArtefactError if `resume` finds checkpoints but none that is whole and of this run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    args = arguments(settings, folder, device=str(next(study.student.parameters()).device.type))
    callbacks: list[TrainerCallback] = [Record(folder / METRICS), interrupt := Interrupt()]
    if show and args.process_index == 0:
        callbacks.append(Show(title))
    if settings.patience:
        callbacks.append(transformers.EarlyStoppingCallback(settings.patience))
    quiet()
    trainer = Trainer(
        study,
        args,
        identity=identity,
        train_dataset=packs,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    for unwanted in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(unwanted)
    last = checkpoint.latest(folder, study=identity) if resume else None
    start = time.perf_counter()
    with interrupt:
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        finally:
            for callback in callbacks:
                if isinstance(callback, Show):
                    callback.close()
    return _outcome(trainer, folder, time.perf_counter() - start)


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
    file = folder / METRICS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _outcome(trainer: Trainer, folder: Path, seconds: float) -> Outcome:
    state = trainer.state
    lines: Sequence[dict[str, int | float]] = [line for line in metrics_of(folder) if "loss" in line]
    recent = lines[-max(1, len(lines) // 10) :]
    names = trainer.study.term_names
    busy = sum(
        line["tokens"] - before for line, before in zip(lines, [0.0, *(x["tokens"] for x in lines)], strict=False)
    )
    spent = sum(
        (line["tokens"] - before) / line["tokens_per_second"]
        for line, before in zip(lines, [0.0, *(x["tokens"] for x in lines)], strict=False)
    )
    return Outcome(
        finished=state.global_step >= state.max_steps or (trainer.control.should_training_stop and not _asked(trainer)),
        steps=state.global_step,
        tokens=int(state.num_input_tokens_seen),
        seconds=seconds,
        tokens_per_second=busy / spent if spent else 0.0,
        peak_memory=peak_memory(trainer.args.device.type),
        losses={name: sum(line[name] for line in recent) / len(recent) for name in names} if recent else {},
    )


def _asked(trainer: Trainer) -> bool:
    return any(isinstance(c, Interrupt) and c.asked for c in trainer.callback_handler.callbacks)
