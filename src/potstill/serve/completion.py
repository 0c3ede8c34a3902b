"""Answers completion requests in the JSON format of OpenAI's legacy endpoint and of vLLM."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from potstill.core.errors import UsageError
from potstill.core.options import MAX_LOGPROBS
from potstill.core.types import Needs
from potstill.data.packing import collate
from potstill.decode.generate import generate, make_noise
from potstill.decode.generation_config import make_filters
from potstill.decode.sampling import Sampling
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.models.inference import get_max_context, inference_context
from potstill.models.load import LoadedModel
from potstill.models.signals import compute_signals
from potstill.serve.request import CompletionRequest

CHUNK_ROWS = 256  # rows whose logits are in memory at once
MIN_LOGPROB = -9999.0  # stands for -inf, which JSON cannot hold, as in vLLM


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


class CompletionHandler:
    """Answers requests one at a time, and the prompts of a request one after another."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_logprobs: int = MAX_LOGPROBS.default,
        sampling_defaults: Mapping[str, float] | None = None,
    ) -> None:
        if max_logprobs < -1:
            raise UsageError(f"--max-logprobs is {max_logprobs}; it must be at least 0, or -1 for no limit")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.vocabulary = loaded.vocabulary
        self.max_logprobs = self.vocabulary if max_logprobs < 0 else max_logprobs
        self.sampling_defaults = dict(sampling_defaults or {})
        self.stop_tokens = find_stop_tokens(loaded.model, loaded.tokenizer)
        self._lock = threading.Lock()
        self.decode_token = lru_cache(maxsize=None)(self._decode_token)

    def create_completion(self, request: CompletionRequest) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """The choices and the usage of the response.

        Raises: UsageError for a prompt that is empty, too long or holds an id of no token, and for more
        log-probabilities than `max_logprobs`.
        """
        self._check_logprobs(request)
        prompts = [self._encode_prompt(prompt, request) for prompt in request.prompts]
        with self._lock, inference_context(self.model):
            results = [self._build_choice(index, ids, request) for index, ids in enumerate(prompts)]
        num_prompt_tokens, num_completion_tokens = sum(map(len, prompts)), sum(num_tokens for _, num_tokens in results)
        usage = {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
        }
        return [choice for choice, _ in results], usage

    def _check_logprobs(self, request: CompletionRequest) -> None:
        for name, number in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
            wanted = self.vocabulary if number == -1 else number or 0
            if min(wanted, self.vocabulary) > self.max_logprobs:
                raise UsageError(
                    f"{name} is {number}, and the maximum allowed is {self.max_logprobs}; ask for fewer, or start the "
                    f"server with a larger --max-logprobs"
                )

    def _encode_prompt(self, prompt: str | list[int], request: CompletionRequest) -> list[int]:
        if isinstance(prompt, str):
            check_text(prompt)
            prompt = list(
                self.tokenizer(prompt, add_special_tokens=request.add_special_tokens, verbose=False).input_ids
            )
        if not prompt:
            raise UsageError("the prompt has no token; write at least one word")
        if max(prompt) >= self.vocabulary:
            raise UsageError(f"the prompt has the id {max(prompt)}; this model's ids are 0 to {self.vocabulary - 1}")
        if len(prompt) + request.tokens > get_max_context(self.model):
            raise UsageError(
                f"{len(prompt)} tokens of prompt and max_tokens={request.tokens} exceed the "
                f"{get_max_context(self.model)} tokens of this model's context; shorten the prompt or lower max_tokens"
            )
        return prompt

    def _build_choice(self, index: int, ids: list[int], request: CompletionRequest) -> tuple[dict[str, Any], int]:
        """A choice and the number of its tokens."""
        tokens, entries = self._generate(ids, request)
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        prompt = request.prompts[index]
        prompt_text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        choice = {
            "index": index,
            "text": prompt_text + text if request.echo else text,
            "logprobs": None if request.logprobs is None else self._build_logprobs(ids, entries, request),
            "finish_reason": "stop" if tokens and tokens[-1] in self.stop_tokens else "length",
            "stop_reason": None,
            "prompt_logprobs": self._build_prompt_logprobs(ids, request),
        }
        return choice, len(tokens)

    def _build_logprobs(
        self, ids: list[int], completion: list[TokenLogprob], request: CompletionRequest
    ) -> dict[str, Any]:
        """OpenAI's parallel lists over the tokens of the answer, with `echo` also over those of the prompt."""
        entries: list[TokenLogprob | None] = list(completion)
        tokens = [entry.token for entry in completion]
        if request.echo:
            entries, tokens = [None, *self._score_prompt(ids, request.logprobs or 0), *completion], [*ids, *tokens]
        texts = [self.decode_token(token) for token in tokens]
        return {
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
            "token_logprobs": [None if entry is None else clamp_logprob(entry.log_p) for entry in entries],
            "tokens": texts,
            "top_logprobs": [None if entry is None else self._build_top_logprobs(entry) for entry in entries],
        }

    def _build_top_logprobs(self, entry: TokenLogprob) -> dict[str, float]:
        logprobs: dict[str, float] = {}
        for token, (log_p, _) in entry.logprobs_by_token.items():
            logprobs.setdefault(self.decode_token(token), clamp_logprob(log_p))
        return logprobs

    def _build_prompt_logprobs(self, ids: list[int], request: CompletionRequest) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs`, which is null for the first token, since nothing predicts it."""
        if request.prompt_logprobs is None:
            return None
        k = self.vocabulary if request.prompt_logprobs < 0 else request.prompt_logprobs
        logprobs: list[dict[str, Any] | None] = [None]
        for entry in self._score_prompt(ids, k):
            logprobs.append(
                {
                    str(token): {
                        "logprob": clamp_logprob(log_p),
                        "rank": rank,
                        "decoded_token": self.decode_token(token),
                    }
                    for token, (log_p, rank) in entry.logprobs_by_token.items()
                }
            )
        return logprobs

    def _score_prompt(self, ids: list[int], k: int) -> Iterator[TokenLogprob]:
        """The log-probabilities of every token of a prompt except the first."""
        if len(ids) == 1:
            return
        token_ids = torch.tensor(ids)
        batch = collate([{"input_ids": token_ids, "labels": token_ids, "lengths": torch.tensor([len(ids)])}])
        batch = {name: values.to(self.model.device) for name, values in batch.items()}
        mask = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        mask[0, -1] = False
        outputs = compute_signals(self.model, batch, Needs(mask), vocabulary=self.vocabulary)
        for rows, tokens in zip(outputs.rows.split(CHUNK_ROWS), token_ids[1:].split(CHUNK_ROWS), strict=True):
            yield from compute_token_logprobs(outputs.logits(rows), tokens.tolist(), k)

    def _generate(self, ids: list[int], request: CompletionRequest) -> tuple[list[int], list[TokenLogprob]]:
        """The tokens of the answer, and their log-probabilities where the request wants them."""
        if not request.tokens:
            return [], []
        entries: list[TokenLogprob] = []

        def keep_logprobs(logits: Tensor, tokens: Tensor) -> None:  # of each step, so that no logits accumulate
            entries.extend(compute_token_logprobs(logits, tokens.tolist(), request.logprobs or 0))

        (tokens,) = generate(
            [(1.0, self.model)],
            [torch.tensor(ids, device=self.model.device)],
            make_noise(1, request.tokens, seed=request.seed).to(self.model.device),
            [request.tokens],
            self._choose_sampling(request),
            on_step=None if request.logprobs is None else keep_logprobs,
        )
        return tokens, entries

    def _choose_sampling(self, request: CompletionRequest) -> Sampling:
        """The settings of the request, and where it samples the server's defaults for what it leaves open."""
        settings = {"temperature": 1.0, **self.sampling_defaults, **request.sampling_settings}
        temperature = settings["temperature"]
        filters = make_filters(settings if temperature > 0 else request.sampling_settings)
        return Sampling(vocabulary=self.vocabulary, stop=self.stop_tokens, temperature=temperature, filters=filters)

    def _decode_token(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


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


def compute_token_logprobs(logits: Float[Tensor, "N V"], tokens: Sequence[int], k: int) -> Iterator[TokenLogprob]:
    """The log-probability of each token under its row of logits, with the `k` likeliest tokens."""
    log_p = logits.float().log_softmax(-1)
    token_log_p = log_p.gather(-1, torch.tensor(tokens, device=log_p.device)[:, None])
    ranks = (log_p > token_log_p).sum(-1) + 1
    values, ids = log_p.topk(min(k, log_p.shape[1]), -1)
    columns = zip(tokens, token_log_p[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
    for token, logprob, rank, top_ids, top_values in columns:
        yield TokenLogprob(token, logprob, rank, list(zip(top_ids, top_values, strict=True)))


def clamp_logprob(log_p: float) -> float:
    """The log-probability, or `MIN_LOGPROB` where it is lower, since JSON has no -inf."""
    return max(log_p, MIN_LOGPROB)
