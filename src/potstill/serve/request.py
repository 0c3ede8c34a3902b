"""The request body of `/v1/completions`: OpenAI's legacy format with some of vLLM's extensions.

The server rejects options that it does not support (`stream`, `n`, `stop`, `top_p`, ...), so that none is ignored.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0, strict=True)]
DEFAULT_MAX_TOKENS = 16  # as of OpenAI and vLLM


class CompletionRequest(BaseModel):
    """One request. A prompt is text or token ids, one or a list; each of a list gets an answer with the same options.

    `logprobs` is the number of likeliest tokens to return for each token of the answer, and with `echo` of the prompt.
    `prompt_logprobs` is the same for the prompt alone, by token id; -1 returns the whole vocabulary.
    A `temperature` of 0 is greedy. `add_special_tokens` adds the tokenizer's special tokens (BOS) to text.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_MAX_TOKENS
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1)] | None = None
    add_special_tokens: bool = True
    n: Literal[1] = 1
    stream: Literal[False] = False
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
