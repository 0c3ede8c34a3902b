"""What may be asked of `/v1/completions`: OpenAI's legacy shape, with `prompt_logprobs` and more of vLLM's extensions.

What this server cannot do (`stream`, `n`, `stop`, `top_p`, ...) is refused, rather than left out in silence.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenId = Annotated[int, Field(ge=0, strict=True)]
DEFAULT_MAX_TOKENS = 16  # OpenAI's, and vLLM's


class CompletionRequest(BaseModel):
    """One request. A prompt is text or token ids, one or a list; all of a list are answered alike.

    `logprobs` asks for so many of the likeliest tokens beside each written one, with `echo` beside the prompt's too;
    `prompt_logprobs` beside the prompt's by token id, -1 for the whole vocabulary. A `temperature` of 0 is greedy.
    `add_special_tokens` is whether text gets what the tokenizer puts before it (BOS).
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
        """Every prompt of the request."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompt_list = [item for item in self.prompt if not isinstance(item, int)]
        return prompt_list or [[item for item in self.prompt if isinstance(item, int)]]

    @property
    def tokens(self) -> int:
        """How many tokens to write at most."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
