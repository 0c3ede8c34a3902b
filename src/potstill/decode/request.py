"""What the decoding loop receives and returns: requests, events of single tokens, and whole completions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from potstill.decode.logprobs import TokenLogprob
from potstill.decode.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodeRequest:
    """One text to continue: the token ids of its prompt, and how to draw at most `max_new_tokens` tokens.

    `sampling.stop` and `stop_strings` end the text. The noise of token i follows from `seed` and i alone; without a
    seed it differs in every call. `noise` gives the numbers in [0, 1) directly. `num_logprobs` is the number of
    likeliest tokens to return with each token, and `prompt_logprobs` the same for each token of the prompt. The first
    are log-probabilities at `logprob_temperature`.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stop_strings: Sequence[str] = ()
    seed: int | None = None
    noise: Float[Tensor, " W"] | None = None
    num_logprobs: int | None = None
    logprob_temperature: float = 1.0
    prompt_logprobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One new token of a request, with the text that became certain by it.

    `text` lags behind the tokens while a character is incomplete or a stop string may still begin. `token` is None if
    the request ended without a new token. The last event of a request has a `finish_reason`, and after a stop string
    also this `stop_string`. `drafted` marks a token that a drafter proposed. `prompt_logprobs` comes with the first
    event.
    """

    request_id: int
    token: int | None
    text: str = ""
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_string: str | None = None
    drafted: bool = False
    prompt_logprobs: Sequence[TokenLogprob] | None = None


@dataclass(kw_only=True)
class Completion:
    """All events of one request together: its new tokens, with the stop token, and its text."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_string: str | None = None

    def add(self, event: TokenEvent) -> None:
        """Appends the next event of the request."""
        if event.token is not None:
            self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.text += event.text
        self.finish_reason, self.stop_string = event.finish_reason, event.stop_string
