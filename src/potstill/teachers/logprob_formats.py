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
from potstill.models.tokenizers.vocabulary import count_token_ids

Prompt = str | Sequence[int]
REPLACEMENT_CHARACTER = "\ufffd"  # what half a character decodes to
MASS_TOLERANCE = 1e-4  # by which rounded probabilities may sum to more than 1
MIN_REST_MASS = 2.0**-24  # what float32 cannot tell from nothing, in a sum near 1


class TopLogprobs(NamedTuple):
    """At each token of a document but the first: the K likeliest, the likeliest first, and the one that stands there.

    A row with fewer than K ends in log_p = -inf under its first id. `log_rest` is the log of the mass of all others,
    `own` the log-probability of the token itself.
    """

    ids: Int64[np.ndarray, "N K"]
    log_p: Float32[np.ndarray, "N K"]
    log_rest: Float32[np.ndarray, " N"]
    token_log_p: Float32[np.ndarray, " N"]

    def select_rows(self, rows: Bool[np.ndarray, " N"]) -> "TopLogprobs":
        """Some of the rows."""
        return TopLogprobs(*(column[rows] for column in self))

    @classmethod
    def from_parts(cls, parts: Sequence["TopLogprobs"], k: int) -> "TopLogprobs":
        """The rows of all `parts`, one after the other; none of any has `k` tokens a row, too."""
        return cls(*(np.concatenate(columns) for columns in zip(build_top_logprobs([], [], k, 1), *parts, strict=True)))


@runtime_checkable
class LogprobFormat(Protocol):
    """How a server is asked for the `k` likeliest tokens at each position, and how its answer is read."""

    name: str

    def build_request(self, prompt: Prompt, k: int) -> dict[str, Any]: ...
    def can_parse(self, choice: Mapping[str, Any]) -> bool: ...
    def parse(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> TopLogprobs: ...


class PromptLogprobs:
    """vLLM's `prompt_logprobs`: at each position the token that stands there and the k likeliest, by id."""

    name = "prompt_logprobs"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary = count_token_ids(tokenizer)

    def build_request(self, prompt: Prompt, k: int) -> dict[str, Any]:
        """The request; nothing is written, which vLLM takes together with `echo` alone."""
        return {"prompt": prompt, "max_tokens": 0, "echo": True, "temperature": 0, "prompt_logprobs": k}

    def can_parse(self, choice: Mapping[str, Any]) -> bool:
        """Whether an answer is in this dialect."""
        return isinstance(choice.get("prompt_logprobs"), list)

    def parse(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> TopLogprobs:
        """What an answer says of the tokens `ids`.

        Raises: VocabularyMismatch where the server read other tokens; ServerError for what is no distribution.
        """
        prompt_logprobs = choice["prompt_logprobs"]
        check_token_count(len(prompt_logprobs), ids)
        token_log_p, rows = [], []
        for position, (token, candidates) in enumerate(zip(ids[1:], prompt_logprobs[1:], strict=True), 1):
            if str(token) not in candidates:
                raise VocabularyMismatch(
                    f"token {position} has the id {token} for the student's tokenizer, and the server names "
                    f"{', '.join(list(candidates)[:3])} there; give a student with the server's own tokenizer"
                )
            token_log_p.append(candidates[str(token)]["logprob"])
            rows.append({int(token_id): entry["logprob"] for token_id, entry in candidates.items()})
        return build_top_logprobs(token_log_p, rows, k, self.vocabulary)


class EchoLogprobs:
    """`echo` with `logprobs`: the prompt's tokens and the k likeliest of each position, as strings."""

    name = "echo with logprobs"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.vocabulary = tokenizer, count_token_ids(tokenizer)

    @cached_property
    def token_texts(self) -> dict[int, str]:
        """What each id decodes to, alone."""
        ids = sorted(self.tokenizer.get_vocab().values())
        decoded_texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        return dict(zip(ids, decoded_texts, strict=True))

    @cached_property
    def ids_by_text(self) -> dict[str, list[int]]:
        """The ids that decode to each string."""
        ids: dict[str, list[int]] = {}
        for token, text in self.token_texts.items():
            ids.setdefault(text, []).append(token)
        return ids

    def build_request(self, prompt: Prompt, k: int) -> dict[str, Any]:
        """The request; nothing is written."""
        return {"prompt": prompt, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": k}

    def can_parse(self, choice: Mapping[str, Any]) -> bool:
        """Whether an answer is in this dialect: one that leaves the prompt out has no null at its beginning."""
        logprobs = choice.get("logprobs") or {}
        return bool(logprobs.get("top_logprobs")) and logprobs["token_logprobs"][0] is None

    def parse(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> TopLogprobs:
        """What an answer says of the tokens `ids`.

        Raises: VocabularyMismatch where the server read other tokens, or names a token by a string that is ambiguous
            or that no id has; ServerError for what is no distribution.
        """
        logprobs = choice["logprobs"]
        check_token_count(len(logprobs["tokens"]), ids)
        for index, (token, text) in enumerate(zip(ids, logprobs["tokens"], strict=True)):
            if text != self.token_texts.get(token) and REPLACEMENT_CHARACTER not in self.token_texts.get(token, ""):
                raise VocabularyMismatch(
                    f"token {index} is {self.token_texts.get(token)!r} for the student's tokenizer and "
                    f"{text!r} for the "
                    f"server; give a student with the server's own tokenizer"
                )
        token_log_p = logprobs["token_logprobs"][1:]
        positions = zip(ids[1:], token_log_p, logprobs["top_logprobs"][1:], strict=True)
        rows = [self._parse_row(candidates, k) or {token: log_p} for token, log_p, candidates in positions]
        return build_top_logprobs(token_log_p, rows, k, self.vocabulary)

    def _parse_row(self, candidates: Mapping[str, float], k: int) -> dict[int, float]:
        likeliest = sorted(candidates.items(), key=lambda item: -item[1])[:k]
        return {self._find_id(text): log_p for text, log_p in likeliest if REPLACEMENT_CHARACTER not in text}

    def _find_id(self, text: str) -> int:
        ids = self.ids_by_text.get(text, [])
        if len(ids) != 1:
            candidates = f"the ids {', '.join(map(str, ids[:3]))}" if ids else "no id"
            raise VocabularyMismatch(
                f"the server names a token by the string {text!r}, which stands for {candidates} of the student's "
                f"tokenizer; lower --top-k, or serve with what gives prompt_logprobs by id, such as vLLM"
            )
        return ids[0]


def build_top_logprobs(
    token_log_p: Sequence[float], rows: Sequence[Mapping[int, float]], k: int, vocabulary: int
) -> TopLogprobs:
    """`rows` of log-probabilities by id, each cut to its `k` likeliest, with the exact mass of the rest.

    Raises: VocabularyMismatch for an id that the student's tokenizer lacks; ServerError where they sum to more than 1.
    """
    n = len(rows)
    ids, log_p = np.zeros((n, k), np.int64), np.full((n, k), -np.inf)
    for row, candidates in enumerate(rows):
        tokens = np.fromiter(candidates, np.int64, len(candidates))
        values = np.fromiter(candidates.values(), np.float64, len(candidates))
        order = np.argsort(-values, kind="stable")[:k]
        ids[row], ids[row, : len(order)], log_p[row, : len(order)] = tokens[order[0]], tokens[order], values[order]
    if n and ids.max() >= vocabulary:
        raise VocabularyMismatch(
            f"the server names the id {ids.max()}, and the student's tokenizer ends at {vocabulary - 1}; lower "
            f"--top-k, or give a student with the server's own tokenizer"
        )
    mass = np.exp(log_p).sum(-1)
    if not np.all(mass <= 1 + MASS_TOLERANCE):
        raise ServerError(
            f"the server's {k} probabilities of one position sum to {mass.max():.4g}; it must give the "
            f"log-probabilities of its logits as they are (vLLM: --logprobs-mode raw_logprobs)"
        )
    is_complete = np.isfinite(log_p).sum(-1) >= vocabulary
    rest_mass = np.where(is_complete, 0.0, np.maximum(1 - mass, MIN_REST_MASS))
    with np.errstate(divide="ignore"):
        log_rest = np.log(rest_mass).astype(np.float32)
    return TopLogprobs(ids, log_p.astype(np.float32), log_rest, np.array(token_log_p, np.float32))


def check_token_count(num_tokens: int, ids: Sequence[int]) -> None:
    """Refuse a server that read another number of tokens.

    Raises: VocabularyMismatch.
    """
    if num_tokens != len(ids):
        raise VocabularyMismatch(
            f"the server reads {num_tokens} tokens where the student's tokenizer reads {len(ids)}; give a "
            f"student with the "
            f"server's own tokenizer, which puts the same tokens (BOS) before a text"
        )
