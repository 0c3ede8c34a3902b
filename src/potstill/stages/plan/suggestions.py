"""Suggests changes to a distillation that take less memory or disk."""

from collections.abc import Iterator
from dataclasses import replace

from potstill.stages.distill.config import DistillConfig

SUGGESTED_LORA_RANK = 16
MIN_CONTEXT = 128  # tokens of the shortest suggested window


def suggest_changes(stage: DistillConfig) -> Iterator[tuple[str, DistillConfig]]:
    """Other configs, each with the option that changes it; the last one combines those that need least memory."""
    settings = stage.settings
    context, pass_tokens = settings.context, settings.packs_per_pass() * settings.context
    smallest_stage = replace(stage, settings=replace(settings, micro_tokens=context))
    for tokens in sorted({pass_tokens // 2 // context * context, context}):
        if context <= tokens < pass_tokens:
            yield f"--micro-tokens {tokens}", replace(stage, settings=replace(settings, micro_tokens=tokens))
    for shorter_context in sorted({context // 2, MIN_CONTEXT}):
        if MIN_CONTEXT <= shorter_context < context:
            shorter_settings = replace(settings, context=shorter_context, micro_tokens=shorter_context)
            yield (
                f"--context {shorter_context} --micro-tokens {shorter_context}",
                replace(stage, settings=shorter_settings),
            )
    if not settings.checkpoint_activations:
        smallest_stage = replace(smallest_stage, settings=replace(smallest_stage.settings, checkpoint_activations=True))
        yield "--checkpoint-activations", replace(stage, settings=replace(settings, checkpoint_activations=True))
    if not stage.lora and stage.train is None:
        yield f"--lora {SUGGESTED_LORA_RANK}", replace(stage, lora=SUGGESTED_LORA_RANK)
        smallest_stage = replace(smallest_stage, lora=SUGGESTED_LORA_RANK)
    can_be_cached = stage.objective.uses_teacher and (
        stage.objective.needs_only_last_hidden or not stage.objective.needs_teacher_model
    )
    if stage.teacher_cache is None and can_be_cached and len(stage.teachers) == 1:
        cache_command = "potstill cache --hidden" if stage.objective.needs_only_last_hidden else "potstill cache"
        yield f"--teacher-cache CACHE, made before with {cache_command}", replace(stage, teacher_cache="CACHE")
        smallest_stage = replace(smallest_stage, teacher_cache="CACHE")
    if settings.save_every and settings.save_every < settings.steps:
        yield f"--save-every {settings.steps}", replace(stage, settings=replace(settings, save_every=settings.steps))
    if smallest_stage != stage:
        yield format_options(stage, smallest_stage), smallest_stage


def format_options(stage: DistillConfig, candidate: DistillConfig) -> str:
    """The options by which `candidate` differs from `stage`, as one string."""
    options = [f"--micro-tokens {candidate.settings.micro_tokens}"]
    adds_checkpointing = candidate.settings.checkpoint_activations and not stage.settings.checkpoint_activations
    options += ["--checkpoint-activations"] if adds_checkpointing else []
    options += [f"--lora {candidate.lora}"] if candidate.lora != stage.lora else []
    options += ["--teacher-cache CACHE"] if candidate.teacher_cache != stage.teacher_cache else []
    return " ".join(options)
