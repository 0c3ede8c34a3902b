"""The form of a completion of a reasoning model: its thinking, `</think>`, its answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from potstill.core.errors import UsageError
from potstill.data.thinking import split_thinking
from potstill.train.rewards.base import Completion, register_reward

MIN_CHARACTERS = 1000  # a response must be longer, in the released code of M-Thinker


@register_reward("format", help="1 for exactly one </think> in more than `minimum` characters, else 0")
@dataclass(frozen=True, kw_only=True)
class Format:
    """1 for a completion with exactly one `</think>` and more than `minimum` characters, else 0.

    Source: M-Thinker (arXiv:2510.07300), whose released code requires more than 1,000 characters. That turns short
    right answers into wrong ones; lower `minimum` for a model that thinks briefly.

    Raises: UsageError for a negative minimum.
    """

    minimum: int = MIN_CHARACTERS

    def __post_init__(self) -> None:
        if self.minimum < 0:
            raise UsageError(f"the minimum of characters is {self.minimum}; it must be at least 0")

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """1 or 0 for each completion."""
        return [float(self.holds(completion.completion)) for completion in completions]

    def holds(self, text: str) -> bool:
        """Whether a completion has this form."""
        return split_thinking(text) is not None and len(text) > self.minimum
