"""A request while the decoding loop writes its text."""

from dataclasses import dataclass, field

from torch import Tensor

from potstill.decode.logprobs import TokenLogprob
from potstill.decode.noise import Noise
from potstill.decode.request import DecodeRequest
from potstill.decode.sampling import Sampling
from potstill.decode.text_stream import TextStream


@dataclass(eq=False)
class ActiveText:
    """A request in a slot: its ids so far, of which the first `num_read` of the prompt are read.

    A text with a `leader` waits until that text has read the prompt of both.
    """

    request_id: int
    request: DecodeRequest
    slot: int
    noise: Noise
    stream: TextStream | None
    ids: list[int]
    num_read: int = 0
    prompt_logprobs: list[TokenLogprob] | None = field(default=None)
    prompt_hidden: list[Tensor] = field(default_factory=list)
    leader: "ActiveText | None" = None

    @property
    def sampling(self) -> Sampling:
        """How its tokens are drawn."""
        return self.request.sampling

    @property
    def num_new_tokens(self) -> int:
        """The number of tokens written so far."""
        return len(self.ids) - len(self.request.prompt)

    @property
    def num_tokens_left(self) -> int:
        """How many tokens it may still gain."""
        return self.request.max_new_tokens - self.num_new_tokens

    @property
    def is_prompt_read(self) -> bool:
        """Whether the text has logits for its next token."""
        return self.num_read >= len(self.request.prompt)
