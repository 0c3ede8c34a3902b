"""The response bodies, as the OpenAPI document describes them: OpenAI's formats with vLLM's `prompt_logprobs`."""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "abort"]


class ErrorBody(BaseModel):
    """What is wrong, for people (`message`) and programs (`type`, `code`: the HTTP status)."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(BaseModel):
    """An error, in OpenAI's format."""

    error: ErrorBody


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptLogprob(BaseModel):
    """The log-probability of a token of the prompt; the likeliest token has rank 1."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionLogprobs(BaseModel):
    """Parallel lists over the tokens."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """An answer to a prompt; the finish reason is null in the chunks of a stream before the last one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None


class CompletionResponse(BaseModel):
    """The response of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class TopLogprob(BaseModel):
    """A token with its bytes and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of an answer, and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of an answer's tokens."""

    content: list[ChatLogprob]
    refusal: None


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer to a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | None


class ChatCompletionResponse(BaseModel):
    """The response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """The model that this server serves; `max_model_len` is the context in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelList(BaseModel):
    """The response of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Whether the server generates text."""

    status: Literal["ok"]


def describe_responses(model: type[BaseModel], *codes: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The responses of a route for its OpenAPI document: `model`, and errors with these status codes."""
    success: dict[str, Any] = {"model": model}
    if streams:
        success["content"] = {"text/event-stream": {}}
    return {200: success, **{code: {"model": ErrorResponse} for code in codes}}
