"""Counts the tokens of a response."""

from collections.abc import Sequence

from potstill.decode.request import Completion


def count_usage(num_prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, int]:
    """OpenAI's usage: the tokens of the prompts, of the answers (with their stop tokens), and of both."""
    num_completion_tokens = sum(len(completion.tokens) for completion in completions)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }
