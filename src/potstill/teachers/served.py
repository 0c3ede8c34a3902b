"""A teacher on an OpenAI-compatible server: requests its log-probabilities for each document of a batch.

A request contains the token ids of one document. The answer contains the log-probabilities of the `top_k` likeliest
tokens at each position. The mass of all other tokens is exact, 1 minus theirs, and forms one class. Without
renormalization, a divergence from this is a lower bound that the teacher itself minimizes (`ops.coarse`).
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import ServerError, UnsupportedModel, UsageError, VocabularyMismatch
from potstill.core.types import IGNORE, NEXT_TOKEN_LOG_P, Batch, Needs, Signals, select_supervised_rows
from potstill.data.packing import collate
from potstill.models.tokenizers.vocabulary import PROBES, count_token_ids
from potstill.ops.coarse import CoarseDistribution
from potstill.teachers.cached import hash_window, split_documents
from potstill.teachers.http_client import Address, HttpClient, RequestRefused
from potstill.teachers.logprob_formats import EchoLogprobs, LogprobFormat, PromptLogprobs, TopLogprobs

TOP_K = 20  # the limit of vLLM without --max-logprobs
MAX_GAP = 0.1  # nats; rounding in bfloat16 explains smaller differences between two answers
PENDING_BYTES = 2**28  # answers that may wait for their batch, in bytes
TOP_K_REFUSAL = re.compile(r"logprobs.*(max|greater|exceed|at most|less than|<=|allowed)", re.IGNORECASE | re.DOTALL)
LOGPROB_FORMATS = (PromptLogprobs, EchoLogprobs)


class PendingAnswer(NamedTuple):
    """A request that was sent, and the number of tokens in its document."""

    future: "Future[TopLogprobs]"
    num_tokens: int


class ServedTeacher:
    """A source of signals on a server, for a student with `tokenizer`.

    At first it finds the format of the server's answers (or takes `format_name`), and checks that the server tokenizes
    known texts as the student does. Call `close` after use.

    Raises:
        UsageError: an invalid address, or a `top_k` above the server's limit.
        ServerError: no answer, or one without the log-probabilities of the prompt.
        VocabularyMismatch: the server has another tokenizer.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_k: int = TOP_K,
        format_name: str | None = None,
        client: HttpClient | None = None,
    ) -> None:
        address = Address.from_string(url)
        self.url, self.tokenizer, self.vocabulary = address.url, tokenizer, count_token_ids(tokenizer)
        self.top_k = min(top_k, self.vocabulary)
        self._client = client or HttpClient(address.url)
        self._pending: OrderedDict[int, PendingAnswer] = OrderedDict()
        try:
            self.name = address.model or self._fetch_first_model()
            self.logprob_format = self._detect_format(
                [
                    format_class(tokenizer)
                    for format_class in LOGPROB_FORMATS
                    if format_name in (None, format_class.name)
                ]
            )
            self._check_probes()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancels all requests, and closes the connections."""
        self._client.close()

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """The teacher's distributions at the supervised rows of a packed batch, as `CoarseDistribution`.

        The scores hold `own_log_p`, the log-probability of each next token.

        Raises: ServerError, VocabularyMismatch; UnsupportedModel for hidden states and other signals of the model.
        """
        if needs.layers or needs.relations or needs.extras:
            raise UnsupportedModel(f"the server at {self.url} gives no hidden states; use a loaded teacher")
        requests = self._request_windows(split_documents(batch))
        for key, _ in requests:
            self._pending.pop(key, None)
        signals = self._build_signals([future.result() for _, future in requests], batch["input_ids"].device)
        return select_supervised_rows(signals, batch, needs)

    def prefetch_packs(self, packs: Any, *, route: int | None = None) -> "PrefetchingPacks":
        """`packs`, with requests for each pack sent as it is read; with a `route`, only for its documents."""
        return PrefetchingPacks(packs, self, route)

    def prefetch(self, pack: Mapping[str, Tensor], *, route: int | None = None) -> None:
        """Sends the requests for a pack before its batch is needed."""
        windows = split_documents(collate([pack]))
        if route is not None:
            windows = [
                window
                for window, is_on_route in zip(windows, (pack["routes"] == route).tolist(), strict=True)
                if is_on_route
            ]
        self._request_windows(windows)

    def _request_windows(
        self, windows: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> list[tuple[int, "Future[TopLogprobs]"]]:
        """(key, answer) of each window with a trained token. Sends the requests that were not sent before."""
        requests = []
        for ids, labels in windows:
            if not (labels[1:] != IGNORE).any():
                continue
            key = hash_window(ids, labels)
            if key not in self._pending:
                future = self._client.submit(self._fetch_trained_rows(ids.tolist(), labels[1:] != IGNORE))
                self._pending[key] = PendingAnswer(future, len(ids))
            requests.append((key, self._pending[key].future))
        self._evict_pending()
        return requests

    def _evict_pending(self) -> None:
        """Drops the oldest unused answers. A batch that needs one later sends a new request."""
        max_tokens = PENDING_BYTES // (12 * self.top_k)
        num_tokens = sum(answer.num_tokens for answer in self._pending.values())
        while num_tokens > max_tokens and self._pending:
            num_tokens -= self._pending.popitem(last=False)[1].num_tokens

    async def _fetch_logprobs(self, prompt: str | Sequence[int], ids: Sequence[int], k: int) -> TopLogprobs:
        """The log-probabilities of the tokens `ids`, which are `prompt` or its tokens."""
        choice = await self._fetch_choice(self.logprob_format, prompt, k)
        try:
            return self.logprob_format.parse(choice, ids, k)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            message = f"{type(error).__name__}: {error}"
            raise ServerError(
                f"the server at {self.url} gives {self.logprob_format.name} in another shape ({message})"
            ) from error

    async def _fetch_trained_rows(self, ids: Sequence[int], label_mask: np.ndarray) -> TopLogprobs:
        return (await self._fetch_logprobs(ids, ids, self.top_k)).select_rows(label_mask)

    async def _fetch_choice(
        self, logprob_format: LogprobFormat, prompt: str | Sequence[int], k: int
    ) -> Mapping[str, Any]:
        """The single choice in an answer of the completions endpoint.

        Raises: UsageError if the server gives fewer than `k` log-probabilities; ServerError.
        """
        try:
            answer = await self._client.request(
                "/completions", {"model": self.name, **logprob_format.build_request(prompt, k)}
            )
        except RequestRefused as error:
            if TOP_K_REFUSAL.search(error.reason):
                raise UsageError(
                    f"the server at {self.url} does not give {k} log-probabilities a token ({error.reason}); "
                    f"start vLLM with --max-logprobs {k}, or lower --top-k here"
                ) from error
            raise
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not choices or not isinstance(choices[0], Mapping):
            raise ServerError(f"the server at {self.url} gives an answer without choices; is its path /v1?")
        return dict(choices[0])

    def _fetch_first_model(self) -> str:
        answer = self._client.submit(self._client.request("/models")).result()
        models = answer.get("data") if isinstance(answer, Mapping) else None
        if not models:
            raise ServerError(f"the server at {self.url} lists no model; give its name: {self.url}#MODEL")
        return str(models[0]["id"])

    def _detect_format(self, formats: Sequence[LogprobFormat]) -> LogprobFormat:
        """The first of the formats that the server supports.

        Raises: ServerError if it supports none.
        """
        ids, refusal = list(self.tokenizer(PROBES[0]).input_ids), ""
        for logprob_format in formats:
            try:
                if logprob_format.can_parse(
                    self._client.submit(self._fetch_choice(logprob_format, ids, self.top_k)).result()
                ):
                    return logprob_format
            except RequestRefused as error:
                refusal = f" (its message: {error.reason})"
        raise ServerError(
            f"the server at {self.url} does not give the log-probabilities of a prompt, neither as prompt_logprobs "
            f"nor as echo with logprobs{refusal}; serve the teacher with vLLM, SGLang or potstill serve"
        )

    def _check_probes(self) -> None:
        """Checks that the server tokenizes known texts as the student does, and answers alike for text and for ids.

        Raises: VocabularyMismatch; ServerError for answers that are no distribution, or differ from each other.
        """
        requests = []
        for text in PROBES:
            ids = list(self.tokenizer(text).input_ids)
            prompts = ((text, 1), (ids, self.top_k))
            requests.append(
                (text, [self._client.submit(self._fetch_logprobs(prompt, ids, k)) for prompt, k in prompts])
            )
        for text, futures in requests:
            try:
                first_log_p, second_log_p = (future.result().token_log_p for future in futures)
            except VocabularyMismatch as error:
                raise VocabularyMismatch(f"in the text {text[:20]!r}: {error}") from error
            gap = float(np.median(np.abs(first_log_p - second_log_p)))
            if not gap <= MAX_GAP:
                raise ServerError(
                    f"the server at {self.url} gives the tokens of {text[:20]!r} log-probabilities that differ by "
                    f"{gap:.2g} nats between two requests; it must give those of its logits, the same each time"
                )

    def _build_signals(self, answers: Sequence[TopLogprobs], device: torch.device) -> Signals:
        logprobs = TopLogprobs.from_parts(answers, self.top_k)
        ids, log_p, log_rest, token_log_p = (torch.from_numpy(array).to(device) for array in logprobs)
        coarse_rows = CoarseDistribution(ids, log_p, log_rest[:, None], torch.ones(self.vocabulary, 1, device=device))
        rows = torch.arange(len(coarse_rows), device=device)
        return Signals(rows=rows, logits=coarse_rows.select_rows, scores={NEXT_TOKEN_LOG_P: token_log_p})


class PrefetchingPacks:
    """A data set of packs that sends a served teacher the requests for each pack as it is read.

    A data loader reads one batch ahead, so the answers arrive during the training step before.
    """

    def __init__(self, packs: Any, teacher: ServedTeacher, route: int | None = None) -> None:
        self._packs, self._teacher, self._route = packs, teacher, route

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pack: dict[str, Tensor] = self._packs[i]
        self._teacher.prefetch(pack, route=self._route)
        return pack
