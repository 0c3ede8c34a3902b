"""Memory, time and disk of an alignment before it starts, from a few measured steps; nothing is written."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from potstill.stages.align.config import AlignConfig
from potstill.stages.align.doctor import make_align_config
from potstill.stages.align.options import AlignTrainConfig
from potstill.stages.align.prepare import prepare
from potstill.stages.align.preview import describe_run
from potstill.stages.align.resources import resolve_settings
from potstill.stages.option_checks import check_single_process
from potstill.stages.resources.profiling import profile_steps
from potstill.train.rollouts.grouped import GroupedRollout

MAX_MEASURED_PASSES = 2  # the second finds the gradients of the first in memory


def plan_align(config: AlignConfig, out: Path, *, measure: bool = True) -> dict[str, Any]:
    """The model, data, steps, memory and disk of a run, and with `measure` the seconds of its parts.

    The parts are forwards, the loss, the backward, the optimizer, and what the model samples in training. They are
    those of steps of at most two passes, scaled to the passes of a step of the run.

    Raises: as `align` does before it writes anything.
    """
    check_single_process()
    config.inputs.check()
    if not measure:
        return describe_run(config, out)
    run = prepare(config)
    settings = resolve_settings(config, run.packs)
    rollout = run.rollout
    if isinstance(rollout, GroupedRollout):  # a few prompts may well have equal rewards
        rollout = replace(rollout, max_idle_steps=sys.maxsize)
    short_settings = shorten_steps(config.settings)
    measurements = profile_steps(run.module, run.module.frozen_models, run.packs, short_settings, rollout=rollout)
    scale = settings.packs_per_step / short_settings.packs_per_step
    parts = {name: part * (1 if name == "optimizer" else scale) for name, part in measurements.seconds.items()}
    seconds = sum(parts.values())
    return {
        **describe_run(config, out, run.prepared),
        "time": {"seconds_per_step": seconds, "seconds": seconds * settings.steps, "parts": parts},
        "measured_peak": measurements.peak,
    }


def shorten_steps(settings: AlignTrainConfig) -> AlignTrainConfig:
    """The same settings with steps of at most two passes, which are as large as those of the run."""
    packs = settings.packs_per_pass() * min(MAX_MEASURED_PASSES, settings.accumulation_steps())
    tokens = packs * settings.context
    return replace(settings, batch_tokens=tokens, prompts_per_step=0, tokens=tokens, epochs=None)


def plan_alignment(options: Mapping[str, Any], out: Path, *, measure: bool = True) -> dict[str, Any]:
    """`plan_align` of the alignment that options of a distillation describe; those at their defaults are left out."""
    return plan_align(make_align_config(options), out, measure=measure)
