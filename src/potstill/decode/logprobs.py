"""Log-probabilities of tokens, with their ranks and the likeliest tokens."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class TokenLogprob(NamedTuple):
    """A token's log-probability and rank (1 is the likeliest), and the likeliest (token, log-probability) pairs."""

    token: int
    log_p: float
    rank: int
    top_logprobs: Sequence[tuple[int, float]]

    @property
    def logprobs_by_token(self) -> dict[int, tuple[float, int]]:
        """(log-probability, rank) by token: first this token's, then those of the likeliest tokens."""
        top_entries = ((token, (log_p, rank)) for rank, (token, log_p) in enumerate(self.top_logprobs, 1))
        return {self.token: (self.log_p, self.rank)} | {
            other_token: logprob_and_rank for other_token, logprob_and_rank in top_entries if other_token != self.token
        }


def compute_token_logprobs(
    logits: Float[Tensor, "N V"], tokens: Sequence[int], k: int, *, temperature: float = 1.0
) -> Iterator[TokenLogprob]:
    """The log-probability of each token under its row of logits / temperature, with the `k` likeliest tokens."""
    scaled_logits = logits.float() if temperature == 1 else logits.float() / temperature
    log_p = scaled_logits.log_softmax(-1)
    token_log_p = log_p.gather(-1, torch.tensor(tokens, device=log_p.device)[:, None])
    ranks = (log_p > token_log_p).sum(-1) + 1
    values, ids = log_p.topk(min(k, log_p.shape[1]), -1)
    columns = zip(tokens, token_log_p[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
    for token, logprob, rank, top_ids, top_values in columns:
        yield TokenLogprob(token, logprob, rank, list(zip(top_ids, top_values, strict=True)))
