"""The options of an alignment that `align`, `plan` and `doctor` share. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from potstill.core.errors import UsageError
from potstill.core.options import Option, list_options

SAMPLES, MAX_TOKENS = 8, 64

PLUS = Option[str | None](
    None, "For aligndistil: the model that prefers chosen answers, or its cache with hidden states."
)
MINUS = Option[str | None](
    None, "For aligndistil: the model that prefers rejected answers, or its cache with hidden states."
)
REWARD = Option[str | None](
    None, "For grpo: what scores an answer, such as accuracy+language or FILE.py:NAME; docs/rewards.md lists them."
)
NUM_SAMPLES = Option(SAMPLES, "For grpo: answers to each prompt, which are compared with one another.")
ANSWER_TOKENS = Option(MAX_TOKENS, "For grpo: most tokens of an answer.")
PROMPTS_PER_STEP = Option(
    0,
    "For grpo: prompts of an optimizer step over all processes, in place of --batch-tokens; 0: --batch-tokens divided "
    "by --context.",
)


@dataclass(frozen=True, kw_only=True)
class AlignmentOptions:
    """What some objectives of an alignment read beside its data: further models, and rewards of samples."""

    plus: str | None = PLUS.field()
    minus: str | None = MINUS.field()
    reward: str | None = REWARD.field()
    samples: int = NUM_SAMPLES.field()
    max_tokens: int = ANSWER_TOKENS.field()
    prompts_per_step: int = PROMPTS_PER_STEP.field()


def refuse_alignment_options(options: Mapping[str, Any]) -> None:
    """Refuse options of an alignment beside an objective that trains on text.

    Raises: UsageError.
    """
    for name, _, _, option in list_options(AlignmentOptions):
        if options.get(name, option.default) != option.default:
            objective = "aligndistil" if name in ("plus", "minus") else "grpo"
            raise UsageError(f"--{name.replace('_', '-')} is for --objective {objective}; omit it")
