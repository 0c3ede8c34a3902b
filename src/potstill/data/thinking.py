"""The thinking of a reasoning model: what an answer holds before `</think>`."""

from typing import NamedTuple

THINKING_START, THINKING_END = "<think>", "</think>"


class ThinkingParts(NamedTuple):
    """The thinking and the answer of a completion."""

    thinking: str
    answer: str


def split_thinking(text: str) -> ThinkingParts | None:
    """The two parts of a completion with exactly one `</think>`; None for any other."""
    if text.count(THINKING_END) != 1:
        return None
    thinking, _, answer = text.partition(THINKING_END)
    return ThinkingParts(thinking.strip().removeprefix(THINKING_START).strip(), answer.strip())


def get_answer_part(text: str) -> str:
    """What follows the thinking, or the whole text where it has no such form."""
    parts = split_thinking(text)
    return text if parts is None else parts.answer
