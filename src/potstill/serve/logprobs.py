"""Writes log-probabilities in the formats of OpenAI's two endpoints, and of vLLM's `prompt_logprobs`."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UnsupportedModel
from potstill.decode.logprobs import TokenLogprob
from potstill.models.tokenizers.token_bytes import read_token_bytes

MIN_LOGPROB = -9999.0  # stands for -inf, which JSON cannot hold, as in vLLM


class LogprobFormatter:
    """Formats log-probabilities with the strings and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.decode_token = lru_cache(maxsize=None)(self._decode_token)

    def format_completion(
        self, tokens: Sequence[int], entries: Sequence[TokenLogprob | None], k: int, *, offset: int = 0
    ) -> dict[str, Any]:
        """OpenAI's parallel lists, with `k` likeliest tokens each; the text begins at the character `offset`.

        An entry is None for the first token of a prompt, since nothing predicts it.
        """
        texts = [self.decode_token(token) for token in tokens]
        return {
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
            "token_logprobs": [None if entry is None else clamp_logprob(entry.log_p) for entry in entries],
            "tokens": texts,
            "top_logprobs": [None if entry is None else self._format_top(entry, k) for entry in entries],
        }

    def format_chat(self, entries: Sequence[TokenLogprob], k: int) -> dict[str, Any]:
        """The list of the tokens of a chat's answer, with `k` likeliest tokens each."""
        content = [
            {
                **self._format_token(entry.token, entry.log_p),
                "top_logprobs": [self._format_token(token, log_p) for token, log_p in entry.top_logprobs[:k]],
            }
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def format_prompt(self, entries: Sequence[TokenLogprob], k: int) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs` by token id, with `k` likeliest tokens each; null for the first token."""
        return [None, *(self._format_by_id(entry, k) for entry in entries)]

    def _format_by_id(self, entry: TokenLogprob, k: int) -> dict[str, Any]:
        entries = crop_entry(entry, k).logprobs_by_token
        return {
            str(token): {"logprob": clamp_logprob(log_p), "rank": rank, "decoded_token": self.decode_token(token)}
            for token, (log_p, rank) in entries.items()
        }

    def _format_top(self, entry: TokenLogprob, k: int) -> dict[str, float]:
        logprobs: dict[str, float] = {}
        for token, (log_p, _) in crop_entry(entry, k).logprobs_by_token.items():
            logprobs.setdefault(self.decode_token(token), clamp_logprob(log_p))
        return logprobs

    def _format_token(self, token: int, log_p: float) -> dict[str, Any]:
        return {"token": self.decode_token(token), "logprob": clamp_logprob(log_p), "bytes": self._get_bytes(token)}

    def _get_bytes(self, token: int) -> list[int]:
        """The bytes of a token, which may be half a character."""
        if self._token_bytes is None:
            return list(self.decode_token(token).encode())
        return list(self._token_bytes[token])

    @cached_property
    def _token_bytes(self) -> list[bytes] | None:
        try:
            return read_token_bytes(self.tokenizer).by_id
        except UnsupportedModel:
            return None

    def _decode_token(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def crop_entry(entry: TokenLogprob, k: int) -> TokenLogprob:
    """The entry with its `k` likeliest tokens alone."""
    return entry if len(entry.top_logprobs) <= k else entry._replace(top_logprobs=entry.top_logprobs[:k])


def clamp_logprob(log_p: float) -> float:
    """The log-probability, or `MIN_LOGPROB` where it is lower, since JSON has no -inf."""
    return max(log_p, MIN_LOGPROB)
