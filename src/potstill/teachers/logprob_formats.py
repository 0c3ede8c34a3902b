"""The two formats in which servers return the log-probabilities of a prompt, parsed into token ids.

`PromptLogprobs` is vLLM's `prompt_logprobs`. `EchoLogprobs` is `echo` with `logprobs`, OpenAI's legacy format, which
SGLang supports. There, tokens are strings, and a string identifies a token only if exactly one id of the student's
tokenizer decodes to it. A part of a character always decodes to "\ufffd", so such a token is not identified, and its
mass counts to the rest.
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
REPLACEMENT_CHARACTER = "\ufffd"  # the text of a token that is part of a character
MASS_TOLERANCE = 1e-4  # rounded probabilities may sum to more than 1 by this much
MIN_REST_MASS = 2.0**-24  # the resolution of float32 in a sum near 1


class TopLogprobs(NamedTuple):
    """For each token of a document but the first: the K likeliest tokens in descending order, and the token itself.

    A row with fewer than K tokens ends in its first id with log_p = -inf. `log_rest` is the log of the mass of all
    other tokens, and `token_log_p` the log-probability of the token in the document.
    """

    ids: Int64[np.ndarray, "N K"]
    log_p: Float32[np.ndarray, "N K"]
    log_rest: Float32[np.ndarray, " N"]
    token_log_p: Float32[np.ndarray, " N"]

    def select_rows(self, rows: Bool[np.ndarray, " N"]) -> "TopLogprobs":
        """The rows where the mask is true."""
        return TopLogprobs(*(column[rows] for column in self))

    @classmethod
    def from_parts(cls, parts: Sequence["TopLogprobs"], k: int) -> "TopLogprobs":
        """The rows of all `parts` in order. Without parts there are no rows, of `k` tokens."""
        return cls(*(np.concatenate(columns) for columns in zip(build_top_logprobs([], [], k, 1), *parts, strict=True)))


@runtime_checkable
class LogprobFormat(Protocol):
    """Builds a request for the `k` likeliest tokens at each position, and parses the answer."""

    name: str

    def build_request(self, prompt: Prompt, k: int) -> dict[str, Any]: ...
    def can_parse(self, choice: Mapping[str, Any]) -> bool: ...
    def parse(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> TopLogprobs: ...


class PromptLogprobs:
    """vLLM's `prompt_logprobs`: at each position the token of the prompt and the k likeliest, by id."""

    name = "prompt_logprobs"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocabulary = count_token_ids(tokenizer)

    def build_request(self, prompt: Prompt, k: int) -> dict[str, Any]:
        """The body of a request. It generates no token, which vLLM accepts only with `echo`."""
        return {"prompt": prompt, "max_tokens": 0, "echo": True, "temperature": 0, "prompt_logprobs": k}

    def can_parse(self, choice: Mapping[str, Any]) -> bool:
        """Whether an answer is in this format."""
        return isinstance(choice.get("prompt_logprobs"), list)

    def parse(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> TopLogprobs:
        """The log-probabilities of the tokens `ids` in an answer.

        Raises: VocabularyMismatch if the server read other tokens; ServerError for values that are no distribution.
        """
        prompt_logprobs = choice["prompt_logprobs"]
        check_token_count(len(prompt_logprobs), ids)
        token_log_p, rows = [], []
        for position, (token, candidates) in enumerate(zip(ids[1:], prompt_logprobs[1:], strict=True), 1):
            if str(token) not in candidates:
                raise VocabularyMismatch(
                    f"token {position} has the id {token} for the student's tokenizer, and the server gives "
                    f"{', '.join(list(candidates)[:3])} there; give a student with the server's own tokenizer"
                )
            token_log_p.append(candidates[str(token)]["logprob"])
            rows.append({int(token_id): entry["logprob"] for token_id, entry in candidates.items()})
        return build_top_logprobs(token_log_p, rows, k, self.vocabulary)


class EchoLogprobs:
    """`echo` with `logprobs`: the prompt's tokens and the k likeliest at each position, as strings."""

    name = "echo with logprobs"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.vocabulary = tokenizer, count_token_ids(tokenizer)

    @cached_property
    def token_texts(self) -> dict[int, str]:
        """The text that each id decodes to."""
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
        """The body of a request. It generates no token."""
        return {"prompt": prompt, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": k}

    def can_parse(self, choice: Mapping[str, Any]) -> bool:
        """Whether an answer is in this format: one without the prompt does not begin with null."""
        logprobs = choice.get("logprobs") or {}
        return bool(logprobs.get("top_logprobs")) and logprobs["token_logprobs"][0] is None

    def parse(self, choice: Mapping[str, Any], ids: Sequence[int], k: int) -> TopLogprobs:
        """The log-probabilities of the tokens `ids` in an answer.

        Raises: VocabularyMismatch if the server read other tokens, or gives a string that is ambiguous or that no id
            decodes to; ServerError for values that are no distribution.
        """
        logprobs = choice["logprobs"]
        check_token_count(len(logprobs["tokens"]), ids)
        for index, (token, text) in enumerate(zip(ids, logprobs["tokens"], strict=True)):
            if text != self.token_texts.get(token) and REPLACEMENT_CHARACTER not in self.token_texts.get(token, ""):
                raise VocabularyMismatch(
                    f"token {index} is {self.token_texts.get(token)!r} for the student's tokenizer and "
                    f"{text!r} for the server; give a student with the server's own tokenizer"
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
                f"the server gives a token as the string {text!r}, which stands for {candidates} of the student's "
                f"tokenizer; lower --top-k, or use a server that gives prompt_logprobs by id, such as vLLM"
            )
        return ids[0]


def build_top_logprobs(
    token_log_p: Sequence[float], rows: Sequence[Mapping[int, float]], k: int, vocabulary: int
) -> TopLogprobs:
    """The `k` likeliest tokens of each row, from log-probabilities by id, and the exact mass of all others.

    Raises: VocabularyMismatch for an id that the student's tokenizer lacks; ServerError if they sum to more than 1.
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
            f"the server gives the id {ids.max()}, and the student's tokenizer ends at {vocabulary - 1}; lower "
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
    """Refuses a server that read another number of tokens.

    Raises: VocabularyMismatch.
    """
    if num_tokens != len(ids):
        raise VocabularyMismatch(
            f"the server reads {num_tokens} tokens where the student's tokenizer reads {len(ids)}; give a "
            f"student with the server's own tokenizer, which puts the same tokens (BOS) before a text"
        )
