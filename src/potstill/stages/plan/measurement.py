"""Measure a few real steps of a planned run."""

from potstill.models.backbone import Backbone
from potstill.models.families.registry import export_model
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.models import add_teacher, load_models
from potstill.stages.distill.module import build_module
from potstill.stages.distill.prepare import move_models
from potstill.stages.model_pair import ModelPair
from potstill.stages.plan.inputs import PlanInputs
from potstill.stages.resources.activation_memory import measure_autograd_bytes
from potstill.stages.resources.calibration import Calibration, fit_calibration
from potstill.stages.resources.layer_timing import measure_layer_timings
from potstill.stages.resources.profiling import profile_steps
from potstill.stages.resources.workload import Workload
from potstill.stages.run_models import load_run_model


def measure_calibration(stage: DistillConfig, inputs: PlanInputs, work: Workload) -> Calibration:
    """The rates of a few measured steps of `stage`, with the module that it would train."""
    pair = load_profiling_pair(stage, inputs)._replace(is_chat=inputs.chats)
    move_models(stage, pair, inputs.dtype)
    module = build_module(stage, pair, inputs.dtype, inputs.caches)
    live_teachers = []
    for network, teacher in pair.loaded_teachers.items():
        if network in inputs.caches:
            teacher.model.to("meta")
        elif work.source == "live":
            live_teachers.append(teacher.model)
    measurements = profile_steps(module, live_teachers, pair.prepare_packs(inputs.packs), stage.settings)
    tensor_bytes = sum(
        work.memory_bytes(measure_autograd_bytes(inputs.student, dtype=inputs.dtype, lora=stage.lora)).values()
    )
    return fit_calibration(measurements, work, measure_layer_timings(work, inputs.device), tensor_bytes=tensor_bytes)


def load_profiling_pair(stage: DistillConfig, inputs: PlanInputs) -> ModelPair:
    """The models of `stage`; a student that would be pruned has its shape and random weights."""
    if stage.student is not None:
        return load_models(stage, inputs.caches, inputs.dtype)
    first, *more_teachers = stage.teachers
    teacher = load_run_model(stage, str(first.location))
    student = export_model(Backbone(inputs.student), teacher.model)
    pair = ModelPair(student, teacher, {first.network: teacher}, inputs.vocabulary, [], {})
    for source in more_teachers:
        pair = add_teacher(stage, pair, source, inputs.caches.get(source.network))
    return pair
