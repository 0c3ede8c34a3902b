"""Checks of the options of an alignment; each refuses a wrong one before anything is read."""

from collections.abc import Sequence

from potstill.core.errors import UsageError
from potstill.core.types import MINUS, PLUS, REFERENCE
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.objectives.policy_options import PolicyOptions
from potstill.stages.align.options import AlignOptions
from potstill.stages.alignment_options import MAX_TOKENS, SAMPLES


def check_objective(objective: ObjectiveConfig) -> None:
    """Refuse an objective that trains on text, and a sum with one that would train on rejected answers too.

    Raises: UsageError.
    """
    if objective.data == "text":
        raise UsageError(f"{objective.name} trains on text; use potstill distill")
    for part in objective.terms:
        if part.term.spec.uses_teacher:
            raise UsageError(f"{part.term.name} learns from a teacher; use potstill distill, or omit it")
        if part.term.name == CROSS_ENTROPY:
            raise UsageError("cross_entropy would train rejected answers too; omit it, and give dpo:nll=WEIGHT")
    if len(objective.terms) > 1 and objective.data in ("preferences", "labels"):
        names = ", ".join(part.term.name for part in objective.terms)
        raise UsageError(f"--objective {names} is a sum, and preferences have one loss; give one of them")


def check_data(data: str | Sequence[str]) -> None:
    """Refuse a run without data.

    Raises: UsageError.
    """
    if not data:
        raise UsageError("no data is given; give --data, such as a .jsonl file of prompt, chosen and rejected")


def check_networks(config: AlignOptions, objective: ObjectiveConfig) -> None:
    """Refuse frozen networks that the objective does not use, and an objective without one that it needs.

    Raises: UsageError.
    """
    if config.reference is not None and config.reference_cache is not None:
        raise UsageError("--reference runs a model and --reference-cache takes its place; give one of them")
    options = {
        REFERENCE: {"--reference": config.reference, "--reference-cache": config.reference_cache},
        PLUS: {"--plus": config.plus},
        MINUS: {"--minus": config.minus},
    }
    for network, flags in options.items():
        for flag, value in flags.items():
            if value is not None and network not in objective.networks:
                raise UsageError(f"{objective.name} compares with no {network} model; omit {flag}")
    missing = [f"--{name}" for name in (PLUS, MINUS) if name in objective.networks and getattr(config, name) is None]
    if missing:
        raise UsageError(
            f"{objective.name} learns from a model of chosen and one of rejected answers, which potstill align "
            f"--objective dpo and dpo:swap=1 make; give {' and '.join(missing)}"
        )


def get_policy_options(objective: ObjectiveConfig) -> PolicyOptions:
    """The options of the policy gradient among the terms of an objective.

    Raises: UsageError for a value out of its range, or an objective without a policy gradient.
    """
    for part in objective.terms:
        if part.term.spec.data == "prompts":
            return PolicyOptions.from_options(part.term.numeric_options, part.term.text_options)
    raise UsageError(f"{objective.name} has no policy gradient; give --objective grpo")


def check_sampling(config: AlignOptions, objective: ObjectiveConfig) -> None:
    """Refuse a group of one answer, prompts without a reward, and options of sampling for an objective without it.

    Raises: UsageError.
    """
    for name, minimum in (("samples", 2), ("max_tokens", 1)):
        if (value := getattr(config, name)) < minimum:
            reason = (
                "answers to a prompt are compared with one another" if name == "samples" else "an answer has tokens"
            )
            raise UsageError(f"--{name.replace('_', '-')} is {value}; {reason}, so give at least {minimum}")
    if not 0 <= config.on_policy <= 1:
        raise UsageError(f"--on-policy is {config.on_policy}; it must be a share of the prompts, from 0 to 1")
    if config.on_policy and PLUS not in objective.networks:
        raise UsageError(f"--on-policy is for aligndistil, and {objective.name} needs answers that are judged; omit it")
    if objective.data == "prompts":
        if config.reward is None:
            raise UsageError(f"{objective.name} needs a reward; give --reward, such as accuracy")
        if config.reference_cache is not None:
            raise UsageError(
                f"--reference-cache holds the log-probabilities of one text, and {objective.name} trains on what the "
                f"model writes; give --reference, or omit it"
            )
        get_policy_options(objective)
        return
    values = {
        "--reward": (config.reward, None),
        "--samples": (config.samples, SAMPLES),
        "--max-tokens": (config.max_tokens, MAX_TOKENS),
        "--prompts-per-step": (config.settings.prompts_per_step, 0),
    }
    for flag, (value, default) in values.items():
        if value != default:
            raise UsageError(
                f"{flag} is for grpo, which samples answers; {objective.name} reads them from the data, so omit it"
            )
