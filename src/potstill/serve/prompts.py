"""Turns the prompts and chats of requests into token ids, and refuses those that the model cannot read."""

import asyncio
from functools import cached_property
from typing import Any

from potstill.core.errors import UsageError
from potstill.models.load import LoadedModel
from potstill.models.tokenizers.chat_renderer import ChatRenderer
from potstill.serve.request import ChatCompletionRequest, CompletionRequest


class PromptEncoder:
    """The tokenizer and the chat template of a model, whose prompts and answers fit in `context` tokens."""

    def __init__(self, loaded: LoadedModel, *, context: int) -> None:
        self.tokenizer, self.vocabulary, self.context = loaded.tokenizer, loaded.vocabulary, context
        self.tokenizer("a")  # sets the tokenizer's modes once, before several threads share it

    @cached_property
    def renderer(self) -> ChatRenderer:
        """The chat template. Raises: DataError if the model has none."""
        return ChatRenderer(self.tokenizer)

    async def encode_prompts(self, request: CompletionRequest) -> list[list[int]]:
        """The token ids of each prompt of a request.

        Raises: UsageError for a prompt that is empty, too long or holds an id of no token.
        """
        return [await asyncio.to_thread(self._encode_prompt, prompt, request) for prompt in request.prompts]

    async def encode_chat(self, request: ChatCompletionRequest) -> list[int]:
        """The token ids of a chat, up to where the answer begins.

        Raises: DataError if there is no chat template, or it refuses the chat; UsageError as for prompts.
        """
        return await asyncio.to_thread(self._encode_chat, request)

    def limit_tokens(self, prompt: list[int], max_tokens: int | None) -> int:
        """The most tokens of an answer: `max_tokens`, or by default the rest of the context.

        Raises: UsageError if prompt and answer exceed the context.
        """
        room = self.context - len(prompt)
        if room < (1 if max_tokens is None else max_tokens):
            wanted = "1 of answer" if max_tokens is None else f"max_tokens={max_tokens}"
            raise UsageError(
                f"{len(prompt)} tokens of prompt and {wanted} exceed the {self.context} tokens of this server's "
                f"context; shorten the prompt, lower max_tokens, or start the server with a larger --context"
            )
        return room if max_tokens is None else max_tokens

    def _encode_prompt(self, prompt: str | list[int], request: CompletionRequest) -> list[int]:
        if isinstance(prompt, str):
            return self._check_ids(self._tokenize(prompt, add_special_tokens=request.add_special_tokens))
        return self._check_ids(prompt)

    def _encode_chat(self, request: ChatCompletionRequest) -> list[int]:
        messages = [message.to_message() for message in request.messages]
        text = self.renderer.render(messages, tools=request.tools, add_generation_prompt=True)
        return self._check_ids(self._tokenize(text, add_special_tokens=False))

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        check_text(text)
        encoding: Any = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(encoding.input_ids)

    def _check_ids(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UsageError("the prompt has no token; write at least one word")
        if max(ids) >= self.vocabulary:
            raise UsageError(f"the prompt has the id {max(ids)}; this model's ids are 0 to {self.vocabulary - 1}")
        return ids


def check_text(text: str) -> None:
    """Refuse text that UTF-8 cannot hold.

    Raises: UsageError.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"character {error.start + 1} of the prompt is U+{ord(text[error.start]):04X}, half of a surrogate pair; "
            f"send whole characters"
        ) from error
