"""Distill: a teacher, a student (or a budget) and text in; a trained, measured student in a stock folder out."""

from functools import partial
from pathlib import Path

from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.prepare import prepare
from potstill.stages.training import TrainingResult, run_training
from potstill.train.fsdp import check_sharding


def distill(
    config: DistillConfig, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True
) -> TrainingResult:
    """Prune the student if the options request it, train it, measure it and its teacher, and write the folder `out`.

    `prepare` reads models and text; `run_training` then warns, measures the baseline, checks, trains and publishes.

    Raises: as `run_training` and `prepare` do.
    """
    check_sharding(config.settings, lora=config.lora, train=config.train, on_policy=config.on_policy)
    return run_training(config, partial(prepare, config), out, overwrite=overwrite, resume=resume, show=show)
