"""Align: a model and preferences or rewards in; a trained, measured model in a stock folder out."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prepare import prepare
from potstill.stages.training import TrainingResult, run_training
from potstill.train.fsdp import check_sharding


def align(
    config: AlignConfig, out: Path, *, overwrite: bool = False, resume: bool = False, show: bool = True
) -> TrainingResult:
    """Train the model under the objective, measure it before and after, and write the folder `out`.

    `prepare` reads models and data; `run_training` then warns, measures the baseline, checks, trains and publishes.

    Raises: as `run_training` and `prepare` do.
    """
    on_policy = 1.0 if config.loss.data == "prompts" else config.on_policy
    check_sharding(config.settings, lora=config.lora, train=config.train, on_policy=on_policy)
    return run_training(config, partial(prepare, config), out, overwrite=overwrite, resume=resume, show=show)


def align_from_options(
    options: Mapping[str, Any], out: Path, *, overwrite: bool = False, resume: bool = False
) -> TrainingResult:
    """`align` with options by their names on the command line, and defaults for all others."""
    return align(AlignConfig.from_options(options), out, overwrite=overwrite, resume=resume)
