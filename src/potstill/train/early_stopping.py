"""When a run must not go on: its loss has exploded, or it gets no better. Both are read off the log, so both resume."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

TrainingLog = Sequence[Mapping[str, float]]

MEDIAN_WINDOW = 20  # steps whose median a loss is compared with
EXPLOSION_FACTOR = 1.5
EXPLOSION_RISE = (
    3.0  # nats: a batch of another kind of text may cost one or two more, and a uniform guess about 11 in all
)


def find_loss_explosion(log: TrainingLog) -> float | None:
    """The median loss of the last 20 steps, if the loss that follows them has exploded, else None.

    It has when it is above 1.5 times that median, more than 3 nats above it, and above the first loss of the run.
    Before there are 20 steps to compare with, nothing is said. The numbers are ours.
    """
    recent = list(islice((line["loss"] for line in reversed(log) if "loss" in line), MEDIAN_WINDOW + 1))
    if len(recent) <= MEDIAN_WINDOW:
        return None
    first = next(line["loss"] for line in log if "loss" in line)
    newest, median = recent[0], statistics.median(recent[1:])
    return median if newest > max(EXPLOSION_FACTOR * median, median + EXPLOSION_RISE, first) else None


def is_patience_exhausted(log: TrainingLog, patience: int) -> bool:
    """Whether the last `patience` evaluations were none better than the best before them; never for a patience of 0."""
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def find_best_step(log: TrainingLog) -> int | None:
    """The step of the best evaluation, the first among equals; None if there was none."""
    evaluations = [(line["eval_loss"], int(line["step"])) for line in log if "eval_loss" in line]
    return min(evaluations)[1] if evaluations else None


class EarlyStopping(TrainerCallback):
    """Saves whenever an evaluation is the best so far; saves and stops once the patience is exhausted."""

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Asks the trainer to save, and to stop."""
        if find_best_step(state.log_history) == state.global_step:
            control.should_save = True
        if is_patience_exhausted(state.log_history, self.evaluations):
            control.should_save = control.should_training_stop = True
