"""Answers that a model samples to chats at temperature 1."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Answer(NamedTuple):
    """A sampled answer with its number of tokens; `ended` is false where it was cut."""

    text: str
    tokens: int
    ended: bool


def sample_answers(
    name: str | Path, chats: Sequence[Sequence[Mapping[str, str]]], *, samples: int, max_tokens: int
) -> list[list[Answer]]:
    """`samples` answers of at most `max_tokens` tokens to each chat. Every model gets the same noise."""
    from potstill.core.device import resolve_dtype
    from potstill.data.prompts import PromptTokenizer
    from potstill.decode.generate import generate_samples, make_noise
    from potstill.decode.sampling import Sampling
    from potstill.decode.stop_tokens import require_stop_tokens
    from potstill.models.inference import inference_context
    from potstill.models.load import load_model
    from potstill.models.tokenizers.vocabulary import count_usable_ids

    model, tokenizer = (loaded := load_model(name)).model, loaded.tokenizer
    stop = require_stop_tokens(model, tokenizer)
    sampling = Sampling(vocabulary=count_usable_ids(tokenizer, model), stop=stop, temperature=1.0)
    prompts = [torch.tensor(PromptTokenizer(tokenizer).encode(chat)) for chat in chats]
    noise = make_noise(len(prompts) * samples, max_tokens, seed=0).view(len(prompts), samples, max_tokens)
    with inference_context(model, dtype=resolve_dtype("auto", device_type="cpu")):
        groups = generate_samples(model, prompts, noise, max_tokens, sampling)

    def decode(tokens: list[int]) -> Answer:
        return Answer(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), tokens[-1] in stop)

    return [[decode(sample.tokens) for sample in group] for group in groups]
