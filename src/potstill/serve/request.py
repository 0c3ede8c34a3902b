"""The request bodies of `/v1/completions` and `/v1/chat/completions`: OpenAI's formats with some of vLLM's extensions.

The server rejects options that it knows and does not support (`logit_bias`, `min_tokens`, ...). It takes the value
that changes nothing, which clients send by default. It ignores fields that it does not know, as vLLM does.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TokenId = Annotated[int, Field(ge=0, strict=True)]
Zero = Annotated[float, Field(ge=0, le=0)]
StopString = Annotated[str, Field(min_length=1)]
DEFAULT_MAX_TOKENS = 16  # of a completion, as of OpenAI and vLLM
MAX_STOP_STRINGS = 16
MAX_TOP_K = 2**31  # more than any vocabulary has
MAX_CHOICES = 128  # `n`, as of OpenAI


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the usage to a stream."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = False


class TextFormat(BaseModel):
    """The format of an answer: plain text alone."""

    type: Literal["text"]


class GenerationRequest(BaseModel):
    """The fields that both kinds of requests have.

    A `temperature` of 0 is greedy. `temperature`, `top_p`, `top_k` (0 or -1: all tokens), `min_p` and
    `repetition_penalty` take the server's defaults where they are null. Choice i of `n` has the seed `seed + i`.
    `stop` and `stop_token_ids` end an answer early; `ignore_eos` generates past the model's own stop tokens.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # not supported: only the values that change nothing
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    min_tokens: Literal[0] | None = None
    bad_words: Annotated[list[str], Field(max_length=0)] | None = None
    allowed_token_ids: None = None
    structured_outputs: None = None
    response_format: TextFormat | None = None
    include_stop_str_in_output: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None

    @property
    def num_choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def sampling_settings(self) -> dict[str, float]:
        """The sampling settings that the request gives."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else min(max(self.top_k, 0), MAX_TOP_K),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: float(value) for name, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _check_stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options applies to a stream; set stream to true")
        return self


class CompletionRequest(GenerationRequest):
    """One request. A prompt is text or token ids, one or a list; each of a list gets answers with the same options.

    `logprobs` is the number of likeliest tokens to return for each token of the answer, and with `echo` of the prompt.
    `prompt_logprobs` is the same for the prompt alone, by token id; -1 returns the whole vocabulary.
    `add_special_tokens` adds the tokenizer's special tokens (BOS) to text. A `max_tokens` of 0 generates nothing.
    """

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_MAX_TOKENS
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    add_special_tokens: bool = True
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts of the request, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompt_list = [item for item in self.prompt if not isinstance(item, int)]
        return prompt_list or [[item for item in self.prompt if isinstance(item, int)]]

    @property
    def token_limit(self) -> int:
        """The maximum number of tokens of an answer."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> "CompletionRequest":
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs are not available in a stream; set stream to false")
        return self


class TextPart(BaseModel):
    """A part of a message's content; this server reads text alone."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """The function that a call names, with its arguments as a JSON object in a string."""

    name: str
    arguments: str = "{}"

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        try:
            content = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError("the arguments of a tool call must be JSON") from error
        if not isinstance(content, dict):
            raise ValueError("the arguments of a tool call must be a JSON object")
        return arguments


class ToolCall(BaseModel):
    """A call that an earlier answer made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall

    def to_message(self) -> dict[str, Any]:
        """The call as a chat template reads it, with the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


class ChatMessage(BaseModel):
    """A message of a chat: text, or a list of text parts. The chat template decides which roles exist."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1)]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def to_message(self) -> dict[str, Any]:
        """The message as a chat template reads it; text parts are joined by line breaks, as vLLM does."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        message: dict[str, Any] = {"role": self.role, "content": text}
        for name in ("name", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [call.to_message() for call in self.tool_calls]
        return message


class ChatCompletionRequest(GenerationRequest):
    """One chat, which the model's chat template renders; the answer is the next message of the assistant.

    `max_completion_tokens`, or else `max_tokens`, limits the answer; without both it may fill the context. `logprobs`
    returns the log-probability of each token, with `top_logprobs` likeliest ones. The server does not parse tool calls:
    it takes `tools` only with `tool_choice` none, and gives them to the chat template.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    # not supported: only the values that change nothing
    prompt_logprobs: None = None
    echo: Literal[False] | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    chat_template: None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None

    @property
    def token_limit(self) -> int | None:
        """The maximum number of tokens of the answer; None if the context alone limits it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are returned with each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _check_fields(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set it to true")
        if self.tools and self.tool_choice != "none":
            raise ValueError("this server does not parse tool calls; set tool_choice to none, or send no tools")
        return self


def list_unknown_fields(request: BaseModel) -> Mapping[str, Any]:
    """The fields of a request that this server does not know, and ignores."""
    return request.model_extra or {}
