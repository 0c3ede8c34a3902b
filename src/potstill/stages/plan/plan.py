"""Plan: estimates the memory, disk and time of a distillation, and suggests changes if it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from potstill.core.device import resolve_dtype
from potstill.evaluate.capacity_gap import advise_sizes
from potstill.evaluate.size import count_blueprint_parameters, count_state_bytes, count_state_growth
from potstill.stages.checks.cross_tokenizer import MIN_ALIGNED_SHARE
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.resources import build_workload
from potstill.stages.distill.rollouts import SAMPLING_TIME_NOTE
from potstill.stages.option_checks import check_single_process
from potstill.stages.options import PlanOptions
from potstill.stages.plan.inputs import PlanInputs, read_inputs
from potstill.stages.plan.measurement import measure_calibration
from potstill.stages.plan.suggestions import suggest_changes
from potstill.stages.resources.activation_memory import measure_autograd_bytes
from potstill.stages.resources.calibration import Calibration, guess_calibration
from potstill.stages.resources.dataset_stats import TeacherTokenization, compute_packing_stats
from potstill.stages.resources.estimate import (
    ResourceEstimate,
    estimate,
    estimate_pruning_bytes,
    measure_tokenizer_bytes,
)
from potstill.stages.resources.layer_timing import guess_layer_timings, measure_layer_timings
from potstill.stages.resources.machine import AvailableResources, get_available_resources
from potstill.stages.resources.profiling import MAX_PROFILING_SECONDS, estimate_profiling_seconds
from potstill.stages.resources.workload import CACHE_ROW_BYTES, Workload
from potstill.stages.stage import to_plain_dict


@dataclass(frozen=True, kw_only=True)
class Plan(PlanOptions):
    """Estimate a run of `distill`. The rates come from `calibration`, or from a few measured steps.

    Without `measure` and without a calibration they are a rough guess.
    """

    distill: DistillConfig
    calibration: Calibration | None = None

    def run(self, out: Path = Path()) -> dict[str, Any]:
        """The plan as plain data; `out` is the folder of the run. This writes no files.

        Raises: UsageError, NotFound, DataError, UnsupportedModel, as `distill` does before it writes anything.
        """
        check_single_process()
        self.distill.inputs.check()
        return self.report(read_inputs(self.distill), out)

    def report(self, inputs: PlanInputs, out: Path) -> dict[str, Any]:
        """The plan of a run on `inputs`, which turn its epochs into tokens."""
        settings = self.distill.settings.resolve_epochs(len(inputs.packs))
        plan = replace(self, distill=replace(self.distill, settings=settings))
        return {"stage": to_plain_dict(self.distill), **plan.compute_numbers(inputs, out)}

    def compute_numbers(self, inputs: PlanInputs, out: Path) -> dict[str, Any]:
        """The numbers of a plan whose settings have tokens and no epochs."""
        calibration, notes = self.get_calibration(inputs)
        notes += [SAMPLING_TIME_NOTE] if self.distill.rollout_config.is_enabled else []
        notes += describe_caveats(self.distill, inputs.teacher_tokenization)
        resources, available = (
            self.estimate(self.distill, inputs, calibration),
            get_available_resources(out, inputs.device),
        )
        teacher, student = count_blueprint_parameters(inputs.teacher), count_blueprint_parameters(inputs.student)
        work = self.build_workload(self.distill, inputs)
        flops = work.flops()
        return {
            "parameters": {
                "teacher": {"blocks": teacher.blocks, "embeddings": teacher.embeddings, "total": teacher.total},
                "student": {"blocks": student.blocks, "embeddings": student.embeddings, "total": student.total},
                "trained": work.trained_parameters,
                "objective": work.objective_cost.weights,
                "share": student.total / teacher.total,
            },
            "alignment": None if inputs.teacher_tokenization is None else inputs.teacher_tokenization.to_dict(),
            "text": {
                **work.packing._asdict(),
                "tokens": inputs.packs.num_tokens,
                "cache_bytes_per_row": cache_bytes_per_row(inputs),
            },
            "state_bytes": {
                name: {"context": count_state_bytes(model, model.context), "token": count_state_growth(model, 1)}
                for name, model in (("teacher", inputs.teacher), ("student", inputs.student))
            },
            "flops_per_token": {**flops, "total": sum(flops.values())},
            **resources.to_dict(),
            "step": {"passes": work.passes, "tokens_per_pass": work.tokens, "rows_per_pass": work.rows},
            "room": {"memory": available.memory, "disk": available.disk},
            "fits": compare_with_available(resources, available),
            "suggestions": list(self.suggest(inputs, calibration, resources, available)),
            "capacity_gap": advise_sizes(teacher=float(teacher.total), student=float(student.total)).to_dict(),
            "calibration": calibration.to_dict(),
            "notes": notes,
        }

    def build_workload(self, stage: DistillConfig, inputs: PlanInputs) -> Workload:
        """The sizes of `stage`, which is this plan's own config or a suggested one."""
        dtype = (
            inputs.dtype
            if stage.dtype == self.distill.dtype
            else resolve_dtype(stage.dtype, device_type=str(inputs.device))
        )
        packing, context = compute_packing_stats(inputs.packs), stage.settings.context
        is_shorter = context < self.distill.settings.context
        tokenization, mean_position = inputs.teacher_tokenization, (context + 1) / 2
        packing = packing._replace(seen=min(packing.seen, mean_position)) if is_shorter else packing
        tokenization = (
            tokenization._replace(seen=min(tokenization.seen, mean_position * tokenization.token_ratio))
            if is_shorter and tokenization
            else tokenization
        )
        vocabulary = inputs.vocabulary
        return build_workload(
            stage,
            inputs.teacher,
            inputs.student,
            vocabulary=vocabulary,
            dtype=dtype,
            packing=packing,
            teacher_tokenization=tokenization,
            more_teachers=inputs.more_teachers,
        )

    def estimate(self, stage: DistillConfig, inputs: PlanInputs, calibration: Calibration) -> ResourceEstimate:
        """The resources that `stage` takes."""
        work = self.build_workload(stage, inputs)
        dtype = torch.bfloat16 if work.compute_bytes == 2 else torch.float32
        pruning = 0.0
        if stage.student is None:
            teacher_autograd_bytes = measure_autograd_bytes(inputs.teacher, dtype=dtype, stock=False)
            pruning = estimate_pruning_bytes(inputs.teacher, inputs.student, teacher_autograd_bytes)
        autograd_bytes = measure_autograd_bytes(inputs.student, dtype=dtype, lora=stage.lora)
        time_layers = measure_layer_timings if calibration.measured else guess_layer_timings
        timings = time_layers(work, inputs.device)
        return estimate(
            work,
            autograd_bytes,
            timings,
            calibration,
            tokenizer_bytes=measure_tokenizer_bytes(inputs.tokenizer),
            pruning_bytes=pruning,
        )

    def get_calibration(self, inputs: PlanInputs) -> tuple[Calibration, list[str]]:
        """The calibration, and notes on its accuracy."""
        if self.calibration is not None:
            return self.calibration, ["the rates come from the given calibration; plan ran no step"]
        guess = guess_calibration(inputs.device)
        if not self.measure:
            return guess, ["plan ran no step: times may be wrong by a factor of two, memory by a quarter"]
        stage, notes = self.choose_profiled_stage(inputs, guess)
        if stage is None:
            return guess, notes
        return measure_calibration(stage, inputs, self.build_workload(stage, inputs)), notes

    def choose_profiled_stage(self, inputs: PlanInputs, guess: Calibration) -> tuple[DistillConfig | None, list[str]]:
        """The config whose steps are measured (a smaller one where the plan's own does not fit, or none), and notes."""
        settings = self.distill.settings
        small_settings = replace(settings, batch_tokens=2 * settings.context, micro_tokens=settings.context)
        free_memory = get_available_resources(Path(), inputs.device).memory
        for candidate in (settings, small_settings):
            stage = replace(self.distill, settings=candidate)
            resources = self.estimate(stage, inputs, guess)
            if estimate_profiling_seconds(resources.seconds_per_step) <= MAX_PROFILING_SECONDS and (
                free_memory is None or resources.phases["training"] - guess.overhead <= free_memory
            ):
                message = f"steps of {candidate.batch_tokens} tokens were measured"
                return stage, [
                    message if candidate is settings else f"{message}: those of the run itself would take too much"
                ]
        return None, [
            "plan ran no step, because even the smallest is too large here: times may be wrong by a factor of two"
        ]

    def suggest(
        self, inputs: PlanInputs, calibration: Calibration, resources: ResourceEstimate, available: AvailableResources
    ) -> Iterator[dict[str, Any]]:
        """Changes that lower memory or disk; the largest saving of memory comes first."""
        suggestions: list[dict[str, Any]] = []
        for change, stage in suggest_changes(self.distill):
            candidate = self.estimate(stage, inputs, calibration)
            needs_cache = stage.teacher_cache is not None and self.distill.teacher_cache is None
            disk = candidate.disk["most"] + (self.build_workload(stage, inputs).cache_bytes() if needs_cache else 0.0)
            if candidate.peak < resources.peak or (candidate.peak == resources.peak and disk < resources.disk["most"]):
                seconds = candidate.seconds_per_step * candidate.steps
                suggestions.append({"change": change, "memory": candidate.peak, "disk": disk, "seconds": seconds})
        for suggestion in sorted(suggestions, key=lambda suggestion: (suggestion["memory"], suggestion["disk"])):
            is_sufficient = (available.memory is None or suggestion["memory"] <= available.memory) and suggestion[
                "disk"
            ] <= available.disk
            yield {**suggestion, "fits": is_sufficient}


def describe_caveats(stage: DistillConfig, tokenization: TeacherTokenization | None) -> Iterator[str]:
    """Notes on costs that the plan does not count, and on a teacher with another tokenizer."""
    if stage.objective.needs_teacher_model:
        yield (
            f"of {stage.objective.name} products with both heads, maps and weights are counted; the rest of its time "
            f"and memory is what measured steps show, and is left out where none was run"
        )
    if tokenization is not None and tokenization.aligned_share < MIN_ALIGNED_SHARE:
        yield (
            f"{tokenization.aligned_share:.1%} of the trained tokens are aligned; at the others an objective "
            f"at aligned tokens "
            f"learns nothing from the teacher"
        )


def compare_with_available(resources: ResourceEstimate, available: AvailableResources) -> dict[str, bool]:
    """Whether memory and disk are enough; unknown memory counts as enough."""
    return {
        "memory": available.memory is None or resources.peak <= available.memory,
        "disk": resources.disk["most"] <= available.disk,
    }


def cache_bytes_per_row(inputs: PlanInputs) -> float:
    """Bytes per row of the teacher's cache; without a cache, of one with the top 64 tokens."""
    cache = inputs.caches.get("teacher")
    return float(CACHE_ROW_BYTES) if cache is None else cache.manifest.bytes / cache.manifest.rows
