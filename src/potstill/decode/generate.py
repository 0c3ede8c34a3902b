"""Writes whole lists of texts with the decoding loop, for rollouts, data sets, samples and ROUGE."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.decode.engine import Engine
from potstill.decode.request import Completion, DecodeRequest
from potstill.decode.runner import ModelRunner
from potstill.decode.sampling import Sampling, SamplingFilters
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.models.eval_mode import eval_mode
from potstill.models.tokenizers.vocabulary import count_token_ids

SAMPLE_SLOTS = 128  # samples that are written at a time; each keeps its keys and values


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are written: at most `max_new_tokens`, greedily at temperature 0, else sampled with `seed`.

    By default `filters` change nothing.
    """

    max_new_tokens: int = 128
    batch_size: int = 8
    temperature: float = 0.0
    seed: int = 0
    filters: SamplingFilters = field(default_factory=SamplingFilters)


def generate(
    weighted_models: Sequence[tuple[float, nn.Module]],
    prompts: Sequence[Int[Tensor, " _"]],
    noise: Float[Tensor, "N W"],
    limits: Sequence[int],
    sampling: Sampling,
) -> list[list[int]]:
    """The tokens that the models write after each prompt, with the stop token: at most `limits[n]` (1 to W) of them.

    `noise` holds a number in [0, 1) for each token. The models run in eval mode, so that neither dropout nor activation
    checkpointing changes the text; afterwards each module has its former mode.
    """
    requests = [
        DecodeRequest(prompt=prompt.tolist(), max_new_tokens=limit, sampling=sampling, noise=row)
        for prompt, limit, row in zip(prompts, limits, noise, strict=True)
    ]
    if not requests:
        return []
    with ExitStack() as stack:
        for _, model in weighted_models:
            stack.enter_context(eval_mode(model))
        (_, runner), *partners = (
            (weight, ModelRunner(model, vocabulary=sampling.vocabulary, slots=len(requests)))
            for weight, model in weighted_models
        )
        engine = Engine(runner, partners=partners)
        request_ids = [engine.add(request) for request in requests]
        completions = engine.run()
    return [completions[request_id].tokens for request_id in request_ids]


class Sample(NamedTuple):
    """The tokens that a model wrote after a prompt, with the stop token, and the log-probability of each.

    The log-probabilities are those at the temperature of the sampling, as the decoder computed them.
    """

    tokens: list[int]
    log_p: list[float]


def generate_samples(
    model: nn.Module,
    prompts: Sequence[Int[Tensor, " _"]],
    noise: Float[Tensor, "P G W"],
    limit: int,
    sampling: Sampling,
    *,
    slots: int = SAMPLE_SLOTS,
) -> list[list[Sample]]:
    """G samples of at most `limit` (1 to W) tokens after each of P prompts. The prompt is read once for all of them.

    `noise` holds a number in [0, 1) for each token, so a sample equals the one that `generate` writes with its noise.
    At most `slots` samples, or G if that is more, are written at a time. The model runs in eval mode.
    """
    num_samples = noise.shape[1]
    if not prompts:
        return []
    with eval_mode(model):
        slots = max(num_samples, min(slots, len(prompts) * num_samples))
        engine = Engine(ModelRunner(model, vocabulary=sampling.vocabulary, slots=slots))
        request_ids = [
            engine.add_samples(
                [
                    DecodeRequest(
                        prompt=prompt.tolist(),
                        max_new_tokens=limit,
                        sampling=sampling,
                        noise=row,
                        num_logprobs=0,
                        logprob_temperature=sampling.temperature,
                    )
                    for row in rows
                ]
            )
            for prompt, rows in zip(prompts, noise, strict=True)
        ]
        completions = engine.run()
    return [[_make_sample(completions[request_id]) for request_id in group] for group in request_ids]


def _make_sample(completion: Completion) -> Sample:
    return Sample(completion.tokens, [logprob.log_p for logprob in completion.logprobs])


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    options: GenerationOptions | None = None,
) -> list[str]:
    """The text that `model` writes after each prompt of token ids, without the prompt and without special tokens.

    Each prompt has its own noise, so its answer does not depend on the other prompts' lengths or on `batch_size`.
    """
    options = options or GenerationOptions()
    sampling = Sampling(
        vocabulary=count_token_ids(tokenizer),
        stop=find_stop_tokens(model, tokenizer),
        temperature=options.temperature,
        filters=options.filters,
    )
    noise = make_noise(len(prompts), options.max_new_tokens, seed=options.seed)
    with eval_mode(model):
        slots = min(options.batch_size, max(1, len(prompts)))
        engine = Engine(ModelRunner(model, vocabulary=sampling.vocabulary, slots=slots), tokenizer)
        request_ids = [
            engine.add(
                DecodeRequest(prompt=prompt, max_new_tokens=options.max_new_tokens, sampling=sampling, noise=row)
            )
            for prompt, row in zip(prompts, noise, strict=True)
        ]
        completions = engine.run()
    return [completions[request_id].text for request_id in request_ids]


def make_noise(num_rows: int, num_tokens: int, *, seed: int | None) -> Float[Tensor, "N W"]:
    """Uniform noise in [0, 1) on the CPU; with `seed` None it differs in every call."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.rand(num_rows, num_tokens, generator=generator)
