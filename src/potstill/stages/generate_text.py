"""Writes a model's answer to one prompt."""

from collections.abc import Callable
from typing import Any

from potstill.core.errors import DataError, UsageError
from potstill.decode.answer_stream import AnswerStream
from potstill.stages.generate_options import MAX_TOKENS, AnswerOptions
from potstill.stages.text_generator import TextGenerator


def generate_text(
    model: str, prompt: str, options: AnswerOptions, *, read: Callable[[AnswerStream], object] = list
) -> dict[str, Any]:
    """The answer of `model` to `prompt`, with its numbers; with `raw` it continues the prompt without a chat template.

    `read` iterates over the answer to its end, and may show the text as it comes.

    Raises: DataError if the prompt has no token, or control tokens that are refused; UsageError if prompt and answer
    exceed the model's context; the errors of `TextGenerator`.
    """
    generator = TextGenerator(model, options)
    max_tokens = options.max_tokens or MAX_TOKENS
    ids = encode_prompt(generator, prompt, max_tokens=max_tokens)
    answer = generator.answer(ids, max_tokens=max_tokens, seed=options.seed)
    read(answer)
    return {"model": model, "prompt": prompt, **answer.to_dict()}


def encode_prompt(generator: TextGenerator, prompt: str, *, max_tokens: int) -> list[int]:
    """The ids of `prompt`, as a user's turn or, with `raw`, as plain text; `max_tokens` of answer fit behind them.

    Raises: DataError, UsageError as `generate_text`.
    """
    is_chat = generator.prompts.template is not None and not generator.options.raw
    ids = generator.encode_chat([{"role": "user", "content": prompt}]) if is_chat else generator.encode_text(prompt)
    if not prompt or not ids:
        raise DataError("the prompt has no token; write at least one word")
    if len(ids) + max_tokens > generator.context:
        raise UsageError(
            f"{len(ids)} tokens of prompt and {max_tokens} of answer exceed the {generator.context} tokens of context "
            f"of {generator.name}; shorten the prompt or lower --max-tokens"
        )
    return ids
