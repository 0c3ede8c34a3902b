"""The two ways in which servers tell the log-probabilities of a prompt, read as tokens by id.

`ById` is vLLM's `prompt_logprobs`. `ByString` is `echo` with `logprobs`, OpenAI's legacy way, which SGLang speaks:
tokens are strings there, and a string stands for a token only if exactly one id of the student's tokenizer decodes to
it. Half a character is the string "\ufffd" whichever half it is, so such a token is not named: its mass is the rest's.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Int64
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import ServerError, VocabularyMismatch
from potstill.models.vocabulary import real_ids

Prompt = str | Sequence[int]
BROKEN = "\ufffd"  # what half a character decodes to
SURPLUS = 1e-4  # by which rounded probabilities may sum to more than 1
LEAST = 2.0**-24  # what float32 cannot tell from nothing, in a sum near 1


class Heard(NamedTuple):
    """At each token of a document but the first: the K likeliest, the likeliest first, and the one that stands there.

    A row with fewer than K ends in log_p = -inf under its first id. `log_rest` is the log of the mass of all others,
    `own` the log-probability of the token itself.
    """

    ids: Int64[np.ndarray, "N K"]
    log_p: Float32[np.ndarray, "N K"]
    log_rest: Float32[np.ndarray, " N"]
    own: Float32[np.ndarray, " N"]

    def at(self, rows: Bool[np.ndarray, " N"]) -> "Heard":
        """Some of the rows."""
        return Heard(*(part[rows] for part in self))

    @classmethod
    def joined(cls, parts: Sequence["Heard"], k: int) -> "Heard":
        """The rows of all `parts`, one after the other; none of any has `k` tokens a row, too."""
        return cls(*(np.concatenate(columns) for columns in zip(heard([], [], k, 1), *parts, strict=True)))


@runtime_checkable
class Dialect(Protocol):
    """How a server is asked for the `k` likeliest tokens at each position, and how its answer is read."""

    name: str

    def body(self, prompt: Prompt, k: int) -> dict[str, Any]: ...
    def spoken(self, choice: Mapping[str, Any]) -> bool: ...
    def read(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> Heard: ...


class ById:
    """vLLM's `prompt_logprobs`: at each position the token that stands there and the k likeliest, by id."""

    name = "prompt_logprobs"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary = real_ids(tokenizer)

    def body(self, prompt: Prompt, k: int) -> dict[str, Any]:
        """The request; nothing is written, which vLLM takes together with `echo` alone."""
        return {"prompt": prompt, "max_tokens": 0, "echo": True, "temperature": 0, "prompt_logprobs": k}

    def spoken(self, choice: Mapping[str, Any]) -> bool:
        """Whether an answer is in this dialect."""
        return isinstance(choice.get("prompt_logprobs"), list)

    def read(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> Heard:
        """What an answer says of the tokens `ids`.

        Raises: VocabularyMismatch where the server read other tokens; ServerError for what is no distribution.
        """
        said = choice["prompt_logprobs"]
        require_length(len(said), ids)
        own, rows = [], []
        for place, (token, known) in enumerate(zip(ids[1:], said[1:], strict=True), 1):
            if str(token) not in known:
                raise VocabularyMismatch(
                    f"token {place} has the id {token} for the student's tokenizer, and the server names "
                    f"{', '.join(list(known)[:3])} there; give a student with the server's own tokenizer"
                )
            own.append(known[str(token)]["logprob"])
            rows.append({int(other): found["logprob"] for other, found in known.items()})
        return heard(own, rows, k, self.vocabulary)


class ByString:
    """`echo` with `logprobs`: the prompt's tokens and the k likeliest of each position, as strings."""

    name = "echo with logprobs"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.vocabulary = tokenizer, real_ids(tokenizer)

    @cached_property
    def texts(self) -> dict[int, str]:
        """What each id decodes to, alone."""
        ids = sorted(self.tokenizer.get_vocab().values())
        decoded = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        return dict(zip(ids, decoded, strict=True))

    @cached_property
    def ids(self) -> dict[str, list[int]]:
        """The ids that decode to each string."""
        found: dict[str, list[int]] = {}
        for token, text in self.texts.items():
            found.setdefault(text, []).append(token)
        return found

    def body(self, prompt: Prompt, k: int) -> dict[str, Any]:
        """The request; nothing is written."""
        return {"prompt": prompt, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": k}

    def spoken(self, choice: Mapping[str, Any]) -> bool:
        """Whether an answer is in this dialect: one that leaves the prompt out has no null at its beginning."""
        said = choice.get("logprobs") or {}
        return bool(said.get("top_logprobs")) and said["token_logprobs"][0] is None

    def read(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> Heard:
        """What an answer says of the tokens `ids`.

        Raises: VocabularyMismatch where the server read other tokens, or names a token by a string that is ambiguous
            or that no id has; ServerError for what is no distribution.
        """
        said = choice["logprobs"]
        require_length(len(said["tokens"]), ids)
        for place, (token, text) in enumerate(zip(ids, said["tokens"], strict=True)):
            if text != self.texts.get(token) and BROKEN not in self.texts.get(token, ""):
                raise VocabularyMismatch(
                    f"token {place} is {self.texts.get(token)!r} for the student's tokenizer and {text!r} for the "
                    f"server; give a student with the server's own tokenizer"
                )
        own = said["token_logprobs"][1:]
        there = zip(ids[1:], own, said["top_logprobs"][1:], strict=True)
        rows = [self._row(known, k) or {token: log_p} for token, log_p, known in there]
        return heard(own, rows, k, self.vocabulary)

    def _row(self, known: Mapping[str, float], k: int) -> dict[int, float]:
        likeliest = sorted(known.items(), key=lambda one: -one[1])[:k]
        return {self._id(text): log_p for text, log_p in likeliest if BROKEN not in text}

    def _id(self, text: str) -> int:
        found = self.ids.get(text, [])
        if len(found) != 1:
            stands = f"the ids {', '.join(map(str, found[:3]))}" if found else "no id"
            raise VocabularyMismatch(
                f"the server names a token by the string {text!r}, which stands for {stands} of the student's "
                f"tokenizer; lower --top-k, or serve with what gives prompt_logprobs by id, such as vLLM"
            )
        return found[0]


def heard(own: Sequence[float], rows: Sequence[Mapping[int, float]], k: int, vocabulary: int) -> Heard:
    """`rows` of log-probabilities by id, each cut to its `k` likeliest, with the exact mass of the rest.

    Raises: VocabularyMismatch for an id that the student's tokenizer lacks; ServerError where they sum to more than 1.
    """
    n = len(rows)
    ids, log_p = np.zeros((n, k), np.int64), np.full((n, k), -np.inf)
    for row, known in enumerate(rows):
        tokens = np.fromiter(known, np.int64, len(known))
        said = np.fromiter(known.values(), np.float64, len(known))
        order = np.argsort(-said, kind="stable")[:k]
        ids[row], ids[row, : len(order)], log_p[row, : len(order)] = tokens[order[0]], tokens[order], said[order]
    if n and ids.max() >= vocabulary:
        raise VocabularyMismatch(
            f"the server names the id {ids.max()}, and the student's tokenizer ends at {vocabulary - 1}; lower "
            f"--top-k, or give a student with the server's own tokenizer"
        )
    mass = np.exp(log_p).sum(-1)
    if not np.all(mass <= 1 + SURPLUS):
        raise ServerError(
            f"the server's {k} probabilities of one position sum to {mass.max():.4g}; it must give the "
            f"log-probabilities of its logits as they are (vLLM: --logprobs-mode raw_logprobs)"
        )
    whole = np.isfinite(log_p).sum(-1) >= vocabulary
    rest = np.where(whole, 0.0, np.maximum(1 - mass, LEAST))
    with np.errstate(divide="ignore"):
        log_rest = np.log(rest).astype(np.float32)
    return Heard(ids, log_p.astype(np.float32), log_rest, np.array(own, np.float32))


def require_length(said: int, ids: Sequence[int]) -> None:
    """Refuse a server that read another number of tokens.

    Raises: VocabularyMismatch.
    """
    if said != len(ids):
        raise VocabularyMismatch(
            f"the server reads {said} tokens where the student's tokenizer reads {len(ids)}; give a student with the "
            f"server's own tokenizer, which puts the same tokens (BOS) before a text"
        )
