"""What a model says to a completion request, in the JSON shapes of OpenAI's legacy endpoint and of vLLM."""

import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig

from potstill.core.errors import UsageError
from potstill.core.types import Needs
from potstill.data.pack import collate
from potstill.evaluate.reading import at_rest, context_of
from potstill.models.load import Loaded
from potstill.models.signals import signals
from potstill.models.vocabulary import real_ids
from potstill.serve.request import Completion

CHUNK = 256  # rows whose logits are alive at once
NEVER = -9999.0  # a log-probability of -inf, which JSON does not know, as vLLM writes it


class Place(NamedTuple):
    """A token where it stands: its log-probability and rank (1 is the likeliest), and the likeliest tokens there."""

    token: int
    log_p: float
    rank: int
    likeliest: Sequence[tuple[int, float]]

    @property
    def known(self) -> dict[int, tuple[float, int]]:
        """(log-probability, rank) by token: its own first, then the likeliest."""
        ranked = ((token, (log_p, rank)) for rank, (token, log_p) in enumerate(self.likeliest, 1))
        return {self.token: (self.log_p, self.rank)} | {t: said for t, said in ranked if t != self.token}


class Speaker:
    """Answers one request at a time: requests wait for one another, the prompts of each are read one by one."""

    def __init__(self, loaded: Loaded) -> None:
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.vocabulary = real_ids(loaded.tokenizer)
        self._turn = threading.Lock()
        self.text_of = lru_cache(maxsize=None)(self._text_of)

    def answer(self, asked: Completion) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """(the choices, the usage).

        Raises: UsageError for a prompt that is empty, too long, or holds an id that stands for no token.
        """
        prompts = [self._ids(prompt, asked) for prompt in asked.prompts]
        with self._turn, at_rest(self.model):
            said = [self._choice(number, ids, asked) for number, ids in enumerate(prompts)]
        read, written = sum(map(len, prompts)), sum(count for _, count in said)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return [choice for choice, _ in said], usage

    def _ids(self, prompt: str | list[int], asked: Completion) -> list[int]:
        if isinstance(prompt, str):
            prompt = list(self.tokenizer(prompt, add_special_tokens=asked.add_special_tokens, verbose=False).input_ids)
        if not prompt:
            raise UsageError("the prompt holds no token; write at least one word")
        if max(prompt) >= self.vocabulary:
            raise UsageError(f"the prompt holds the id {max(prompt)}; the ids here are 0 to {self.vocabulary - 1}")
        if len(prompt) + asked.tokens > context_of(self.model):
            raise UsageError(
                f"{len(prompt)} tokens of prompt and max_tokens={asked.tokens} are more than the "
                f"{context_of(self.model)} tokens of context that this model has; ask for less"
            )
        return prompt

    def _choice(self, number: int, ids: list[int], asked: Completion) -> tuple[dict[str, Any], int]:
        """A choice, and how many tokens were written for it."""
        written, stopped = self._write(ids, asked)
        text = self.tokenizer.decode([place.token for place in written], skip_special_tokens=True)
        prompt = asked.prompts[number]
        echoed = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
        choice = {
            "index": number,
            "text": echoed + text if asked.echo else text,
            "logprobs": None if asked.logprobs is None else self._legacy(ids, written, asked),
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": None,
            "prompt_logprobs": self._by_id(ids, asked),
        }
        return choice, len(written)

    def _legacy(self, ids: list[int], written: list[Place], asked: Completion) -> dict[str, Any]:
        """OpenAI's parallel lists over the tokens of the answer, and with `echo` of the prompt before it."""
        places: list[Place | None] = list(written)
        tokens = [place.token for place in written]
        if asked.echo:
            places, tokens = [None, *self._read(ids, asked.logprobs or 0), *written], [*ids, *tokens]
        texts = [self.text_of(token) for token in tokens]
        return {
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)) if texts else [],
            "token_logprobs": [None if place is None else plain(place.log_p) for place in places],
            "tokens": texts,
            "top_logprobs": [None if place is None else self._by_text(place) for place in places],
        }

    def _by_text(self, place: Place) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, (log_p, _) in place.known.items():
            found.setdefault(self.text_of(token), plain(log_p))
        return found

    def _by_id(self, ids: list[int], asked: Completion) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs`: null for the first token, which nothing predicts."""
        if asked.prompt_logprobs is None:
            return None
        k = self.vocabulary if asked.prompt_logprobs < 0 else asked.prompt_logprobs
        shown: list[dict[str, Any] | None] = [None]
        for place in self._read(ids, k):
            shown.append(
                {
                    str(token): {"logprob": plain(log_p), "rank": rank, "decoded_token": self.text_of(token)}
                    for token, (log_p, rank) in place.known.items()
                }
            )
        return shown

    def _read(self, ids: list[int], k: int) -> Iterator[Place]:
        """Every token of a prompt but the first, where it stands."""
        if len(ids) == 1:
            return
        row = torch.tensor(ids)
        batch = collate([{"input_ids": row, "labels": row, "lengths": torch.tensor([len(ids)])}])
        batch = {name: values.to(self.model.device) for name, values in batch.items()}
        asked = torch.ones_like(batch["input_ids"], dtype=torch.bool)
        asked[0, -1] = False
        said = signals(self.model, batch, Needs(asked), vocabulary=self.vocabulary)
        for rows, tokens in zip(said.rows.split(CHUNK), row[1:].split(CHUNK), strict=True):
            yield from placed(said.logits(rows), tokens.tolist(), k)

    def _write(self, ids: list[int], asked: Completion) -> tuple[list[Place], bool]:
        """What is written after a prompt, and whether it ends with a stop token."""
        if not asked.tokens:
            return [], False
        stop = self.model.generation_config.eos_token_id
        stop = self.tokenizer.eos_token_id if stop is None else stop
        warm = {"temperature": asked.temperature, "top_p": 1.0, "top_k": 0} if asked.temperature else {}
        config = GenerationConfig(
            max_new_tokens=asked.tokens,
            do_sample=bool(asked.temperature),
            eos_token_id=stop,
            pad_token_id=self.tokenizer.eos_token_id or 0,
            return_dict_in_generate=True,
            output_logits=True,
            **warm,
        )
        prompt = torch.tensor([ids], device=self.model.device)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices, enabled=asked.seed is not None):
            if asked.seed is not None:
                torch.manual_seed(asked.seed)
            found = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        tokens = found.sequences[0, len(ids) :].tolist()
        logits = torch.cat(found.logits)[:, : self.vocabulary]
        stops = stop if isinstance(stop, list) else [stop]
        return list(placed(logits, tokens, asked.logprobs or 0)), tokens[-1] in stops

    def _text_of(self, token: int) -> str:
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def placed(logits: Float[Tensor, "N V"], tokens: Sequence[int], k: int) -> Iterator[Place]:
    """Every token in the distribution that its row of logits is."""
    log_p = logits.float().log_softmax(-1)
    own = log_p.gather(-1, torch.tensor(tokens, device=log_p.device)[:, None])
    ranks = (log_p > own).sum(-1) + 1
    values, ids = log_p.topk(min(k, log_p.shape[1]), -1)
    each = zip(tokens, own[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
    for token, said, rank, likeliest, theirs in each:
        yield Place(token, said, rank, list(zip(likeliest, theirs, strict=True)))


def plain(log_p: float) -> float:
    """A log-probability as JSON can hold it."""
    return max(log_p, NEVER)
