"""Writes text with a model: one loop for rollouts, data sets, samples, ROUGE and the server.

Prompts are padded on the left, each model keeps a key-value cache, and rows that have ended leave the batch.
Several models may write together: tokens are then drawn from the weighted mean of their distributions,

    P = sum_k w_k softmax(logits_k / temperature)

Of a model's generation config the loop reads the stop tokens alone. Greedy decoding is therefore the argmax of the
model's own logits, and every other setting is the caller's.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.decode.sampling import (
    Sampling,
    SamplingFilters,
    penalize_repetition,
    sample_tokens,
    token_probabilities,
)
from potstill.decode.stop_tokens import find_stop_tokens
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import get_head, probe_model, unwrap_model
from potstill.models.tokenizers.vocabulary import count_token_ids

log = logging.getLogger("potstill")
StepCallback = Callable[[Float[Tensor, "B V"], Int[Tensor, " B"]], object]


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


class CachedDecoder:
    """A model while it writes a batch of texts, with its key-value cache.

    A model that keeps no cache reads the whole texts again for each token: the same result, but slowly.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        self.model, self.vocabulary = unwrap_model(model), vocabulary
        self.probe = probe_model(model)
        self.cache: Any = None
        self.has_started = False

    def compute_logits(self, ids: Int[Tensor, "B S"], attention_mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B V"]:
        """The logits of the token after `ids`, of which only the last is read where a cache holds the others.

        `attention_mask` is False at padding.
        """
        new_ids = ids if self.cache is None else ids[:, -1:]
        inputs: dict[str, Any] = {"input_ids": new_ids, "attention_mask": attention_mask.long()}
        if self.probe.takes_position_ids:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new_ids.shape[1] :]
            inputs["position_ids"] = position_ids + self.probe.position_offset
        reads_anew = self.cache is None and self.has_started
        inputs |= {"use_cache": False} if reads_anew else {"past_key_values": self.cache, "use_cache": True}
        module = self.model.base_model if self.probe.has_head_on_hidden_states else self.model
        outputs = module(**inputs)
        self._store_cache(outputs)
        if not self.probe.has_head_on_hidden_states:
            logits: Tensor = outputs.logits[:, -1, : self.vocabulary]
            return logits
        return get_head(self.model).crop_vocabulary(self.vocabulary).logits(outputs.last_hidden_state[:, -1])

    def select_rows(self, rows: Int[Tensor, " B"]) -> None:
        """Keep only these rows of the batch."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def _store_cache(self, outputs: Any) -> None:
        self.cache = getattr(outputs, "past_key_values", None)
        if self.cache is None and not self.has_started:
            name = type(self.model).__name__
            log.warning("note: %s has no key-value cache, so each new token reads the whole text again", name)
        self.has_started = True


@torch.no_grad()
def generate(
    weighted_models: Sequence[tuple[float, nn.Module]],
    prompts: Sequence[Int[Tensor, " _"]],
    noise: Float[Tensor, "N W"],
    limits: Sequence[int],
    sampling: Sampling,
    *,
    on_step: StepCallback | None = None,
) -> list[list[int]]:
    """The tokens that the models write after each prompt, with the stop token: at most `limits[n]` (1 to W) of them.

    `noise` holds a number in [0, 1) for each token. `on_step` receives the first model's own logits and the drawn
    tokens of every step, for the rows that have not ended. The models run in eval mode, so that neither dropout nor
    activation checkpointing changes the text; afterwards each module has its former mode.
    """
    decoders = [(weight, CachedDecoder(model, sampling.vocabulary)) for weight, model in weighted_models]
    completions: list[list[int]] = [[] for _ in prompts]
    ids, attention_mask = pad_left(prompts)
    unfinished = torch.arange(len(prompts), device=ids.device)
    with ExitStack() as stack:
        for _, model in weighted_models:
            stack.enter_context(eval_mode(model))
        while len(unfinished):
            logits = [decoder.compute_logits(ids, attention_mask) for _, decoder in decoders]
            step_noise = noise[unfinished, len(completions[int(unfinished[0])])]
            step_logits = [penalize_repetition(rows, ids, attention_mask, sampling) for rows in logits]
            tokens = _draw_tokens(step_logits, [weight for weight, _ in decoders], step_noise, sampling)
            if on_step is not None:
                on_step(logits[0], tokens)
            for row, token in zip(unfinished.tolist(), tokens.tolist(), strict=True):
                completions[row].append(token)
            places = _find_unfinished(unfinished, completions, limits, sampling.stop)
            if len(places) < len(unfinished):
                for _, decoder in decoders:
                    decoder.select_rows(places)
            unfinished, tokens = unfinished[places], tokens[places][:, None]
            ids = torch.cat([ids[places], tokens], 1)
            attention_mask = torch.cat([attention_mask[places], torch.ones_like(tokens, dtype=torch.bool)], 1)
    return completions


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
    noise = make_noise(len(prompts), options.max_new_tokens, seed=options.seed).to(model.device)
    length_order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # so that batches hold little padding
    texts = [""] * len(prompts)
    for start in range(0, len(prompts), options.batch_size):
        indices = length_order[start : start + options.batch_size]
        batch = [torch.tensor(prompts[n], device=model.device) for n in indices]
        limits = [options.max_new_tokens] * len(indices)
        completions = generate([(1.0, model)], batch, noise[indices], limits, sampling)
        for index, text in zip(indices, tokenizer.batch_decode(completions, skip_special_tokens=True), strict=True):
            texts[index] = text
    return texts


def make_noise(num_rows: int, num_tokens: int, *, seed: int | None) -> Float[Tensor, "N W"]:
    """Uniform noise in [0, 1) on the CPU; with `seed` None it differs in every call."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return torch.rand(num_rows, num_tokens, generator=generator)


def pad_left(prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """(ids, mask): every prompt ends in the last column, and the mask is False at the padding before it."""
    ids = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    attention_masks = [torch.ones_like(prompt, dtype=torch.bool) for prompt in prompts]
    return ids, pad_sequence(attention_masks, batch_first=True, padding_side="left")


def _draw_tokens(
    logits: Sequence[Float[Tensor, "B V"]], weights: Sequence[float], noise: Float[Tensor, " B"], sampling: Sampling
) -> Int[Tensor, " B"]:
    """A token for each row, from the weighted mean of the models' distributions."""
    if sampling.temperature == 0 and len(logits) == 1:
        return logits[0].argmax(-1)
    weighted_logits = zip(weights, logits, strict=True)
    probabilities = [weight * token_probabilities(rows, sampling) for weight, rows in weighted_logits]
    return sample_tokens(torch.stack(probabilities).sum(0), noise)


def _find_unfinished(
    unfinished: Int[Tensor, " B"], completions: Sequence[Sequence[int]], limits: Sequence[int], stop: frozenset[int]
) -> Int[Tensor, " _"]:
    """The indices in `unfinished` of the texts that have neither a stop token nor their full length."""
    rows = unfinished.tolist()
    places = [
        n for n, row in enumerate(rows) if completions[row][-1] not in stop and len(completions[row]) < limits[row]
    ]
    return torch.tensor(places, dtype=torch.long, device=unfinished.device)
