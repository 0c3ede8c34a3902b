"""Memory, time and disk of an alignment before it starts, from a few measured steps; nothing is written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.stages.align.config import AlignConfig
from potstill.stages.align.doctor import make_align_config
from potstill.stages.align.prepare import prepare
from potstill.stages.align.preview import describe_run
from potstill.stages.align.resources import resolve_settings
from potstill.stages.option_checks import check_single_process
from potstill.stages.resources.profiling import profile_steps


def plan_align(config: AlignConfig, out: Path, *, measure: bool = True) -> dict[str, Any]:
    """The model, data, steps, memory and disk of a run, and with `measure` the seconds of its parts.

    The parts are forwards, the loss, the backward, the optimizer, and what the model samples in training.

    Raises: as `align` does before it writes anything.
    """
    check_single_process()
    config.inputs.check()
    if not measure:
        return describe_run(config, out)
    run = prepare(config)
    settings = resolve_settings(config, run.packs)
    measurements = profile_steps(run.module, run.module.frozen_models, run.packs, settings, rollout=run.rollout)
    seconds = sum(measurements.seconds.values())
    return {
        **describe_run(config, out, run.prepared),
        "time": {"seconds_per_step": seconds, "seconds": seconds * settings.steps, "parts": measurements.seconds},
        "measured_peak": measurements.peak,
    }


def plan_alignment(options: Mapping[str, Any], out: Path, *, measure: bool = True) -> dict[str, Any]:
    """`plan_align` of the alignment that options of a distillation describe; those at their defaults are left out."""
    return plan_align(make_align_config(options), out, measure=measure)
