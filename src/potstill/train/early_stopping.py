"""Decides from the log when a run stops: its loss has exploded, or evaluations do not improve."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

TrainingLog = Sequence[Mapping[str, float]]

MEDIAN_WINDOW = 20  # steps whose median a loss is compared with
EXPLOSION_FACTOR = 1.5
EXPLOSION_RISE = 3.0  # nats: another kind of text may cost one or two more; a uniform guess costs about 11


def find_loss_explosion(log: TrainingLog) -> float | None:
    """The median loss of the 20 steps before the newest, if the newest loss has exploded; else None.

    A loss has exploded if it is above 1.5 times that median, more than 3 nats above it, and above the first loss of the
    run. Returns None until there are 20 earlier steps. Source: ours.
    """
    recent = list(islice((line["loss"] for line in reversed(log) if "loss" in line), MEDIAN_WINDOW + 1))
    if len(recent) <= MEDIAN_WINDOW:
        return None
    first = next(line["loss"] for line in log if "loss" in line)
    newest, median = recent[0], statistics.median(recent[1:])
    return median if newest > max(EXPLOSION_FACTOR * median, median + EXPLOSION_RISE, first) else None


def is_patience_exhausted(log: TrainingLog, patience: int) -> bool:
    """Whether none of the last `patience` evaluations was better than the best before them. False for 0."""
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])


def find_best_step(log: TrainingLog) -> int | None:
    """The step of the best evaluation (the first of equal ones), or None without evaluations."""
    evaluations = [(line["eval_loss"], int(line["step"])) for line in log if "eval_loss" in line]
    return min(evaluations)[1] if evaluations else None


class EarlyStopping(TrainerCallback):
    """Saves after each evaluation that is the best so far. Saves and stops once the patience is exhausted."""

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the trainer save or stop, as the log says."""
        if find_best_step(state.log_history) == state.global_step:
            control.should_save = True
        if is_patience_exhausted(state.log_history, self.evaluations):
            control.should_save = control.should_training_stop = True
