"""The request body of `/v1/completions`: OpenAI's legacy format with some of vLLM's extensions.

The server rejects options that it does not support (`stream`, `n`, `stop`, ...), so that none is ignored. It accepts
them with the value that changes nothing, which clients send by default (`n: 1`, `stop: null`, `frequency_penalty: 0`).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0, strict=True)]
Zero = Annotated[float, Field(ge=0, le=0)]
DEFAULT_MAX_TOKENS = 16  # as of OpenAI and vLLM


class CompletionRequest(BaseModel):
    """One request. A prompt is text or token ids, one or a list; each of a list gets an answer with the same options.

    `logprobs` is the number of likeliest tokens to return for each token of the answer, and with `echo` of the prompt.
    `prompt_logprobs` is the same for the prompt alone, by token id; -1 returns the whole vocabulary.
    A `temperature` of 0 is greedy. `temperature`, `top_p`, `top_k` (0 or -1: all tokens), `min_p` and
    `repetition_penalty` take the server's defaults where they are null. `add_special_tokens` adds the tokenizer's
    special tokens (BOS) to text.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_MAX_TOKENS
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    add_special_tokens: bool = True
    # not supported: only the values that change nothing
    n: Literal[1] | None = 1
    best_of: Literal[1] | None = None
    stream: Literal[False] | None = False
    stream_options: None = None
    stop: Annotated[list[str], Field(max_length=0)] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    suffix: Literal[""] | None = None
    user: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts of the request, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompt_list = [item for item in self.prompt if not isinstance(item, int)]
        return prompt_list or [[item for item in self.prompt if isinstance(item, int)]]

    @property
    def tokens(self) -> int:
        """The maximum number of tokens of an answer."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def sampling_settings(self) -> dict[str, float]:
        """The sampling settings that the request gives."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: value for name, value in given.items() if value is not None}
