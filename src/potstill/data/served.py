"""A teacher that is served: what it says about a text, asked over the wire from an OpenAI-compatible server.

For each document of a batch one request goes out with its token ids; the answer holds the log-probabilities of the
`top_k` likeliest tokens at each position. The mass of all others is exact, 1 minus theirs, and stays one class: nothing
is renormalised, so a divergence from it is a lower bound that the teacher itself minimises (`ops.coarse`).
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
from potstill.core.types import IGNORE, OWN, Batch, Needs, Signals
from potstill.data.cache import key_of, windows_of
from potstill.data.dialects import ById, ByString, Dialect, Heard
from potstill.data.pack import collate
from potstill.data.wire import Address, Refused, Wire
from potstill.models.vocabulary import PROBES, real_ids
from potstill.ops.coarse import Coarse

TOP_K = 20  # what vLLM gives unless it was started with another --max-logprobs
PARITY = 0.1  # nats between two answers about a token that rounding in bfloat16 explains
ROOM = 2**28  # bytes of answers that may wait for their batch
CAPPED = re.compile(r"logprobs.*(max|greater|exceed|at most|less than|<=|allowed)", re.IGNORECASE | re.DOTALL)
DIALECTS = (ById, ByString)


class Under(NamedTuple):
    """A question under way, and how many tokens it is about."""

    way: "Future[Heard]"
    tokens: int


class Served:
    """A teacher that answers over the wire, as a live one would.

    It is asked first in which dialect it speaks (or `dialect` says so), and refused unless it reads known texts as the
    student's `tokenizer` does. Close it when it is no longer needed.

    Raises:
        UsageError: an address that is none; more tokens a position than the server gives.
        ServerError: no answer, or none that tells the log-probabilities of a prompt.
        VocabularyMismatch: the server has another tokenizer.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_k: int = TOP_K,
        dialect: str | None = None,
        wire: Wire | None = None,
    ) -> None:
        address = Address.parse(url)
        self.url, self.tokenizer, self.vocabulary = address.url, tokenizer, real_ids(tokenizer)
        self.top_k = min(top_k, self.vocabulary)
        self._wire = wire or Wire(address.url)
        self._waiting: OrderedDict[int, Under] = OrderedDict()
        try:
            self.name = address.model or self._first_model()
            self.dialect = self._dialect([kind(tokenizer) for kind in DIALECTS if dialect in (None, kind.name)])
            self._probe()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up what is under way, and end the connections."""
        self._wire.close()

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        """What the teacher says about the supervised rows of a packed batch, as `Coarse`; `own_log_p` in the scores.

        Raises: ServerError, VocabularyMismatch; UnsupportedModel for what no server tells.
        """
        if needs.layers or needs.relations or needs.extras:
            raise UnsupportedModel(f"the server at {self.url} gives no hidden states; use a teacher that is here")
        asked = self._ask(windows_of(batch))
        for key, _ in asked:
            self._waiting.pop(key, None)
        return self._signals([way.result() for _, way in asked], batch["input_ids"].device)

    def ahead(self, packs: Any, *, route: int | None = None) -> "Ahead":
        """`packs`, of which each is asked about as soon as it is read; with a `route`, about the documents of it."""
        return Ahead(packs, self, route)

    def prepare(self, pack: Mapping[str, Tensor], *, route: int | None = None) -> None:
        """Ask about a pack before its batch comes, so that the answer is there by then."""
        windows = windows_of(collate([pack]))
        if route is not None:
            windows = [one for one, own in zip(windows, (pack["routes"] == route).tolist(), strict=True) if own]
        self._ask(windows)

    def _ask(self, windows: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, "Future[Heard]"]]:
        """Each window with a token to learn: what it is found by, and its answer, asked for if it is not yet."""
        asked = []
        for window, trained in windows:
            if not (trained[1:] != IGNORE).any():
                continue
            key = key_of(window, trained)
            if key not in self._waiting:
                way = self._wire.soon(self._learn(window.tolist(), trained[1:] != IGNORE))
                self._waiting[key] = Under(way, len(window))
            asked.append((key, self._waiting[key].way))
        self._forget()
        return asked

    def _forget(self) -> None:
        """Let go of the oldest answers that no batch came for; one that comes after all asks again."""
        room = ROOM // (12 * self.top_k)
        tokens = sum(under.tokens for under in self._waiting.values())
        while tokens > room and self._waiting:
            tokens -= self._waiting.popitem(last=False)[1].tokens

    async def _hear(self, prompt: str | Sequence[int], ids: Sequence[int], k: int) -> Heard:
        """What the server says of the tokens `ids`, which are `prompt` or what it stands for."""
        choice = await self._choice(self.dialect, prompt, k)
        try:
            return self.dialect.read(choice, ids, k)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            shown = f"{type(error).__name__}: {error}"
            raise ServerError(
                f"the server at {self.url} gives {self.dialect.name} in another shape ({shown})"
            ) from error

    async def _learn(self, ids: Sequence[int], trained: np.ndarray) -> Heard:
        return (await self._hear(ids, ids, self.top_k)).at(trained)

    async def _choice(self, dialect: Dialect, prompt: str | Sequence[int], k: int) -> Mapping[str, Any]:
        """The one choice of an answer.

        Raises: UsageError where the server gives fewer log-probabilities than `k`; ServerError.
        """
        try:
            answer = await self._wire.ask("/completions", {"model": self.name, **dialect.body(prompt, k)})
        except Refused as error:
            if CAPPED.search(error.said):
                raise UsageError(
                    f"the server at {self.url} does not give {k} log-probabilities a token ({error.said}); start vLLM "
                    f"with --max-logprobs {k}, or lower --top-k here"
                ) from error
            raise
        choices = answer.get("choices") if isinstance(answer, Mapping) else None
        if not choices or not isinstance(choices[0], Mapping):
            raise ServerError(f"the server at {self.url} answers without choices; is its path /v1?")
        return dict(choices[0])

    def _first_model(self) -> str:
        found = self._wire.soon(self._wire.ask("/models")).result()
        models = found.get("data") if isinstance(found, Mapping) else None
        if not models:
            raise ServerError(f"the server at {self.url} lists no model; name one: {self.url}#MODEL")
        return str(models[0]["id"])

    def _dialect(self, known: Sequence[Dialect]) -> Dialect:
        """The first dialect that the server speaks.

        Raises: ServerError where it speaks none.
        """
        ids, why = list(self.tokenizer(PROBES[0]).input_ids), ""
        for dialect in known:
            try:
                if dialect.spoken(self._wire.soon(self._choice(dialect, ids, self.top_k)).result()):
                    return dialect
            except Refused as error:
                why = f" (it says: {error.said})"
        raise ServerError(
            f"the server at {self.url} does not tell the log-probabilities of a prompt, neither as prompt_logprobs "
            f"nor as echo with logprobs{why}; serve the teacher with vLLM, SGLang or potstill serve"
        )

    def _probe(self) -> None:
        """Known texts, as text and as ids, must be read as the student's tokenizer reads them, and told of alike.

        Raises: VocabularyMismatch; ServerError for what is no distribution, or another one each time.
        """
        asked = []
        for text in PROBES:
            ids = list(self.tokenizer(text).input_ids)
            both = ((text, 1), (ids, self.top_k))
            asked.append((text, [self._wire.soon(self._hear(prompt, ids, k)) for prompt, k in both]))
        for text, ways in asked:
            try:
                first, second = (way.result().own for way in ways)
            except VocabularyMismatch as error:
                raise VocabularyMismatch(f"of {text[:20]!r}: {error}") from error
            gap = float(np.median(np.abs(first - second)))
            if not gap <= PARITY:
                raise ServerError(
                    f"the server at {self.url} gives the tokens of {text[:20]!r} log-probabilities that lie {gap:.2g} "
                    f"nats apart when it is asked twice; it must give those of its logits, the same each time"
                )

    def _signals(self, said: Sequence[Heard], device: torch.device) -> Signals:
        heard = Heard.joined(said, self.top_k)
        ids, log_p, log_rest, own = (torch.from_numpy(part).to(device) for part in heard)
        known = Coarse(ids, log_p, log_rest[:, None], torch.ones(self.vocabulary, 1, device=device))
        rows = torch.arange(len(known), device=device)
        return Signals(rows=rows, logits=known.at, scores={OWN: own})


class Ahead:
    """A data set of packs that starts a served teacher's answer to each one that is read.

    A loader reads one batch ahead, so that answers come while the step before trains.
    """

    def __init__(self, packs: Any, teacher: Served, route: int | None = None) -> None:
        self._packs, self._teacher, self._route = packs, teacher, route

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pack: dict[str, Tensor] = self._packs[i]
        self._teacher.prepare(pack, route=self._route)
        return pack
