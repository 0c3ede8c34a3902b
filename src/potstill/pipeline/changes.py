"""Other ways to run a distillation, which take less."""

from collections.abc import Iterator
from dataclasses import replace

from potstill.pipeline.distill import Distill

RANK = 16  # of the adapters that are suggested
SHORTEST = 128  # tokens of the shortest window that is suggested


def changes(stage: Distill) -> Iterator[tuple[str, Distill]]:
    """Other ways to run `stage`, each by one option; at the end all that need least, together."""
    settings = stage.settings
    context, pass_tokens = settings.context, settings.packs_per_pass() * settings.context
    smallest = replace(stage, settings=replace(settings, micro_tokens=context))
    for tokens in sorted({pass_tokens // 2 // context * context, context}):
        if context <= tokens < pass_tokens:
            yield f"--micro-tokens {tokens}", replace(stage, settings=replace(settings, micro_tokens=tokens))
    for shorter in sorted({context // 2, SHORTEST}):
        if SHORTEST <= shorter < context:
            brief = replace(settings, context=shorter, micro_tokens=shorter)
            yield f"--context {shorter} --micro-tokens {shorter}", replace(stage, settings=brief)
    if not settings.checkpoint_activations:
        smallest = replace(smallest, settings=replace(smallest.settings, checkpoint_activations=True))
        yield "--checkpoint-activations", replace(stage, settings=replace(settings, checkpoint_activations=True))
    if not stage.lora:
        yield f"--lora {RANK}", replace(stage, lora=RANK)
        smallest = replace(smallest, lora=RANK)
    served = stage.objective.teaches and (stage.objective.recalled or not stage.objective.alive)
    if stage.teacher_cache is None and served:
        made = "potstill cache --hidden" if stage.objective.recalled else "potstill cache"
        yield f"--teacher-cache CACHE, made before by {made}", replace(stage, teacher_cache="CACHE")
        smallest = replace(smallest, teacher_cache="CACHE")
    if settings.save_every and settings.save_every < settings.steps:
        yield f"--save-every {settings.steps}", replace(stage, settings=replace(settings, save_every=settings.steps))
    if smallest != stage:
        yield described(stage, smallest), smallest


def described(stage: Distill, other: Distill) -> str:
    """The options by which `other` differs, all together."""
    said = [f"--micro-tokens {other.settings.micro_tokens}"]
    twice = other.settings.checkpoint_activations and not stage.settings.checkpoint_activations
    said += ["--checkpoint-activations"] if twice else []
    said += [f"--lora {other.lora}"] if other.lora != stage.lora else []
    said += ["--teacher-cache CACHE"] if other.teacher_cache != stage.teacher_cache else []
    return " ".join(said)
