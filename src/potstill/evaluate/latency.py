"""Measures speed and peak memory: prefill and decode at batch size 1, by Hugging Face's `generate` with its cache.

A streamer records when each token arrives. The time to the first token is the prefill, and the mean time between
tokens is one decoding step. Both include the overhead of Python, as a user of `generate` sees it. The model's own
generation config is hidden: its beams and penalties would be timed too.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from potstill.core.device import get_dtype_name
from potstill.core.errors import UsageError
from potstill.core.memory import get_peak_memory, reset_peak_memory
from potstill.decode.generation_config import plain_generation_config
from potstill.models.inference import get_max_context, inference_context


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """How speed is measured: lengths of prompt and answer, and runs; `threads` None changes nothing."""

    prompt_tokens: int = 256
    new_tokens: int = 64
    runs: int = 5
    warm_up: int = 1
    threads: int | None = None
    seed: int = 0

    def limit_to_context(self, model: PreTrainedModel) -> "LatencyConfig":
        """This configuration with prompt and answer shortened to the model's context."""
        max_context = get_max_context(model)
        new_tokens = min(self.new_tokens, max(2, max_context // 4))
        return replace(self, new_tokens=new_tokens, prompt_tokens=min(self.prompt_tokens, max_context - new_tokens))


@dataclass(frozen=True)
class Speed:
    """Tokens per second of every run, peak memory in bytes, and the conditions in words."""

    prefill: Float[np.ndarray, " r"]
    decode: Float[np.ndarray, " r"]
    peak_memory: int
    conditions: str


class _TimingStreamer(BaseStreamer):
    """Records the time of every call of `generate`: first with the prompt, then with each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_model(model: PreTrainedModel, latency_config: LatencyConfig | None = None) -> Speed:
    """The prefill and decode speed of `model` in its present dtype and on its present device.

    Raises: UsageError if nothing would be timed or the model's context is too short.
    """
    latency_config = latency_config or LatencyConfig()
    _check_config(model, latency_config)
    with inference_context(model), plain_generation_config(model), use_threads(latency_config.threads):
        for _ in range(latency_config.warm_up):
            _time_generation(model, latency_config)
        reset_peak_memory(model.device)
        times = np.array([_time_generation(model, latency_config) for _ in range(latency_config.runs)])
        peak_bytes, conditions = get_peak_memory(model.device), _describe_conditions(model, latency_config)
    prefill_seconds, decode_seconds = times.T
    return Speed(latency_config.prompt_tokens / prefill_seconds, 1.0 / decode_seconds, peak_bytes, conditions)


def _check_config(model: PreTrainedModel, latency_config: LatencyConfig) -> None:
    if latency_config.prompt_tokens < 1 or latency_config.new_tokens < 2 or latency_config.runs < 1:
        raise UsageError(f"{latency_config} times nothing; give at least one prompt token, two new tokens and one run")
    if (total_tokens := latency_config.prompt_tokens + latency_config.new_tokens) > get_max_context(model):
        raise UsageError(
            f"a prompt and answer of {total_tokens} tokens exceed the model's context of {get_max_context(model)}"
        )


def _time_generation(model: PreTrainedModel, latency_config: LatencyConfig) -> tuple[float, float]:
    """(seconds until the first token, mean seconds between tokens)."""
    generator = torch.Generator().manual_seed(latency_config.seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, latency_config.prompt_tokens), generator=generator).to(model.device)
    config = GenerationConfig(
        max_new_tokens=latency_config.new_tokens,
        min_new_tokens=latency_config.new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    streamer = _TimingStreamer()
    start_time = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=streamer)
    first_time, *later_times = streamer.times[1:]  # the first call holds the prompt
    return first_time - start_time, (later_times[-1] - first_time) / len(later_times)


@contextmanager
def use_threads(num_threads: int | None) -> Iterator[None]:
    """Let torch compute on `num_threads` inside the block; None changes nothing."""
    previous_threads = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(previous_threads)


def _describe_conditions(model: PreTrainedModel, latency_config: LatencyConfig) -> str:
    hardware = f"{torch.get_num_threads()} threads" if model.device.type == "cpu" else str(model.device)
    dtype = get_dtype_name(model.dtype)
    tokens = f"{latency_config.prompt_tokens} + {latency_config.new_tokens} tokens"
    return f"{dtype}, {hardware}, batch 1, {tokens}, median of {latency_config.runs} runs"
