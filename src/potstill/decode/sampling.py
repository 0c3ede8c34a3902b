"""Tokens drawn after many prompts at once, with a KV cache and from given noise.

    token = the first v with P(0) + ... + P(v) > u,     P = sum_k w_k softmax(logits_k / tau)

u in [0, 1) comes in as a tensor, so that what is written follows from the noise of its own row: not from the batch
around it, nor from any generator's state. Several voices (w_k) write together; one voice is ordinary sampling.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence

from potstill.core.errors import UnsupportedModel
from potstill.models.eval_mode import eval_mode
from potstill.models.signals import get_head, probe_model, unwrap_model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which ids may be drawn (those below `vocabulary`), at which temperature (0: the likeliest), and which end a text.

    Nothing else bends the distribution (no top-p, no top-k), so that what is drawn is what the models say.
    """

    vocabulary: int
    stop: frozenset[int]
    temperature: float = 1.0


class CachedDecoder:
    """A model in the middle of writing several texts: what it remembers of them.

    Raises: UnsupportedModel, once it has read, where it remembers nothing that could be continued.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        self.model, self.vocabulary = unwrap_model(model), vocabulary
        self.probe = probe_model(model)
        self.cache: Any = None

    def compute_logits(self, ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B V"]:
        """The logits of what follows `ids`, which continue what was read before; `real` marks what is no padding."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": attention_mask.long()}
        if self.probe.takes_position_ids:
            inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        module = self.model.base_model if self.probe.has_known_head else self.model
        outputs = module(**inputs, past_key_values=self.cache, use_cache=True)
        self.cache = getattr(outputs, "past_key_values", None)
        if self.cache is None:
            raise UnsupportedModel(f"{type(self.model).__name__} keeps no cache to write with; train it on fixed text")
        if not self.probe.has_known_head:
            logits: Tensor = outputs.logits[:, -1, : self.vocabulary]
            return logits
        return get_head(self.model).crop_vocabulary(self.vocabulary).logits(outputs.last_hidden_state[:, -1])

    def select_rows(self, rows: Int[Tensor, " B"]) -> None:
        """Forgets all texts but these."""
        self.cache.batch_select_indices(rows)


@torch.no_grad()
def complete(
    weighted_models: Sequence[tuple[float, nn.Module]],
    prompts: Sequence[Int[Tensor, " _"]],
    noise: Float[Tensor, "N W"],
    limits: Sequence[int],
    sampling: Sampling,
) -> list[list[int]]:
    """What the models write after each of some prompts, its stop token included: at most `limits[n]` (1 to W) tokens.

    The models are in eval mode meanwhile, so that neither dropout nor activation checkpointing has a part in it, and
    in their own mode afterwards. Texts that have ended are no longer computed.
    """
    decoders = [(weight, CachedDecoder(model, sampling.vocabulary)) for weight, model in weighted_models]
    completions: list[list[int]] = [[] for _ in prompts]
    ids, attention_mask = pad_left(prompts)
    unfinished = torch.arange(len(prompts), device=ids.device)
    with ExitStack() as stack:
        for _, model in weighted_models:
            stack.enter_context(eval_mode(model))
        while len(unfinished):
            probabilities = torch.stack(
                [
                    weight * token_probabilities(decoder.compute_logits(ids, attention_mask), sampling)
                    for weight, decoder in decoders
                ]
            )
            tokens = sample_tokens(probabilities.sum(0), noise[unfinished, len(completions[int(unfinished[0])])])
            for row, token in zip(unfinished.tolist(), tokens.tolist(), strict=True):
                completions[row].append(token)
            places = _find_unfinished(unfinished, completions, limits, sampling.stop)
            if len(places) < len(unfinished):
                for _, decoder in decoders:
                    decoder.select_rows(places)
            unfinished, ids = unfinished[places], tokens[places][:, None]
            attention_mask = torch.cat([attention_mask[places], torch.ones_like(ids, dtype=torch.bool)], 1)
    return completions


def token_probabilities(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """The distribution that is drawn from, in float64: sums over a large vocabulary are rounded too far in float32."""
    if sampling.temperature == 0:
        return one_hot(logits.argmax(-1), logits.shape[1]).double()
    return (logits.double() / sampling.temperature).softmax(-1)


def sample_tokens(probabilities: Float[Tensor, "B V"], noise: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token of each row at which its cumulated probability first exceeds the noise."""
    cumulative = probabilities.cumsum(-1)
    threshold = noise.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)


def pad_left(prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """(ids, which of them are real): every prompt ends in the last column."""
    ids = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    attention_masks = [torch.ones_like(prompt, dtype=torch.bool) for prompt in prompts]
    return ids, pad_sequence(attention_masks, batch_first=True, padding_side="left")


def _find_unfinished(
    unfinished: Int[Tensor, " B"], completions: Sequence[Sequence[int]], limits: Sequence[int], stop: frozenset[int]
) -> Int[Tensor, " _"]:
    """The places in `alive` of the texts that go on."""
    rows = unfinished.tolist()
    places = [
        n for n, row in enumerate(rows) if completions[row][-1] not in stop and len(completions[row]) < limits[row]
    ]
    return torch.tensor(places, dtype=torch.long, device=unfinished.device)
