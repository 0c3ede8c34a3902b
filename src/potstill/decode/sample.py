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
from potstill.models.evaluating import evaluating
from potstill.models.signals import head_of, network, plain


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which ids may be drawn (those below `vocabulary`), at which temperature (0: the likeliest), and which end a text.

    Nothing else bends the distribution (no top-p, no top-k), so that what is drawn is what the models say.
    """

    vocabulary: int
    stop: frozenset[int]
    temperature: float = 1.0


class Voice:
    """A model in the middle of writing several texts: what it remembers of them.

    Raises: UnsupportedModel, once it has read, where it remembers nothing that could be continued.
    """

    def __init__(self, model: nn.Module, vocabulary: int) -> None:
        self.model, self.vocabulary = plain(model), vocabulary
        self.facts = network(model)
        self.memory: Any = None

    def read(self, ids: Int[Tensor, "B T"], real: Bool[Tensor, "B S"]) -> Float[Tensor, "B V"]:
        """The logits of what follows `ids`, which continue what was read before; `real` marks what is no padding."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
        if self.facts.placed:
            inputs["position_ids"] = (real.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        asked = self.model.base_model if self.facts.head_known else self.model
        said = asked(**inputs, past_key_values=self.memory, use_cache=True)
        self.memory = getattr(said, "past_key_values", None)
        if self.memory is None:
            raise UnsupportedModel(f"{type(self.model).__name__} keeps no cache to write with; train it on fixed text")
        if not self.facts.head_known:
            logits: Tensor = said.logits[:, -1, : self.vocabulary]
            return logits
        return head_of(self.model).real(self.vocabulary).logits(said.last_hidden_state[:, -1])

    def keep(self, rows: Int[Tensor, " B"]) -> None:
        """Forgets all texts but these."""
        self.memory.batch_select_indices(rows)


@torch.no_grad()
def complete(
    voices: Sequence[tuple[float, nn.Module]],
    prompts: Sequence[Int[Tensor, " _"]],
    noise: Float[Tensor, "N W"],
    limits: Sequence[int],
    sampling: Sampling,
) -> list[list[int]]:
    """What the models write after each of some prompts, its stop token included: at most `limits[n]` (1 to W) tokens.

    The models are in eval mode meanwhile, so that neither dropout nor activation checkpointing has a part in it, and
    in their own mode afterwards. Texts that have ended are no longer computed.
    """
    speaking = [(weight, Voice(model, sampling.vocabulary)) for weight, model in voices]
    written: list[list[int]] = [[] for _ in prompts]
    ids, real = pad_left(prompts)
    alive = torch.arange(len(prompts), device=ids.device)
    with ExitStack() as asleep:
        for _, model in voices:
            asleep.enter_context(evaluating(model))
        while len(alive):
            likely = torch.stack([weight * chances(voice.read(ids, real), sampling) for weight, voice in speaking])
            tokens = draw(likely.sum(0), noise[alive, len(written[int(alive[0])])])
            for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                written[row].append(token)
            going = _going(alive, written, limits, sampling.stop)
            if len(going) < len(alive):
                for _, voice in speaking:
                    voice.keep(going)
            alive, ids = alive[going], tokens[going][:, None]
            real = torch.cat([real[going], torch.ones_like(ids, dtype=torch.bool)], 1)
    return written


def chances(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """The distribution that is drawn from, in float64: sums over a large vocabulary are rounded too far in float32."""
    if sampling.temperature == 0:
        return one_hot(logits.argmax(-1), logits.shape[1]).double()
    return (logits.double() / sampling.temperature).softmax(-1)


def draw(likely: Float[Tensor, "B V"], noise: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token of each row at which its cumulated probability first exceeds the noise."""
    reached = likely.cumsum(-1)
    aim = noise.to(reached)[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, aim, right=True)[:, 0].clamp(max=likely.shape[1] - 1)


def pad_left(prompts: Sequence[Int[Tensor, " _"]]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """(ids, which of them are real): every prompt ends in the last column."""
    ids = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    real = [torch.ones_like(prompt, dtype=torch.bool) for prompt in prompts]
    return ids, pad_sequence(real, batch_first=True, padding_side="left")


def _going(
    alive: Int[Tensor, " B"], written: Sequence[Sequence[int]], limits: Sequence[int], stop: frozenset[int]
) -> Int[Tensor, " _"]:
    """The places in `alive` of the texts that go on."""
    rows = alive.tolist()
    on = [n for n, row in enumerate(rows) if written[row][-1] not in stop and len(written[row]) < limits[row]]
    return torch.tensor(on, dtype=torch.long, device=alive.device)
