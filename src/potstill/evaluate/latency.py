"""How fast a model is and how much memory that takes: prefill and decode at batch 1, through `generate` with its cache.

A streamer notes when each token arrives. The time until the first is the prefill, the mean gap afterwards one decoding
step, so both hold what a caller of `generate` waits for, Python included.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from potstill.core import backend
from potstill.core.errors import UsageError
from potstill.evaluate.reading import at_rest, context_of


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is timed: a prompt of random tokens, what is written after it, and how often; `threads` None leaves them."""

    prompt_tokens: int = 256
    new_tokens: int = 64
    runs: int = 5
    warm_up: int = 1
    threads: int | None = None
    seed: int = 0

    def within(self, model: PreTrainedModel) -> "Trial":
        """The same trial, its prompt and answer shortened to what the model can take in; it says so in its note."""
        room = context_of(model)
        new = min(self.new_tokens, max(2, room // 4))
        return replace(self, new_tokens=new, prompt_tokens=min(self.prompt_tokens, room - new))


@dataclass(frozen=True)
class Speed:
    """Tokens per second of every run, peak memory in bytes, and what they were measured on."""

    prefill: Float[np.ndarray, " r"]
    decode: Float[np.ndarray, " r"]
    peak_memory: int
    conditions: str


class _Arrivals(BaseStreamer):
    """Notes the time of everything that `generate` hands on: the prompt first, then token by token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_model(model: PreTrainedModel, trial: Trial | None = None) -> Speed:
    """Prefill and decode speed of `model` as it stands, in the dtype and on the device that it is on.

    Raises: UsageError where nothing would be timed or the model's context is too short.
    """
    trial = trial or Trial()
    _check(model, trial)
    with at_rest(model), threads(trial.threads):
        for _ in range(trial.warm_up):
            _run(model, trial)
        reset_peak_memory(model.device)
        times = np.array([_run(model, trial) for _ in range(trial.runs)])
        peak, conditions = peak_memory(model.device), _conditions(model, trial)
    until_first, between = times.T
    return Speed(trial.prompt_tokens / until_first, 1.0 / between, peak, conditions)


def _check(model: PreTrainedModel, trial: Trial) -> None:
    if trial.prompt_tokens < 1 or trial.new_tokens < 2 or trial.runs < 1:
        raise UsageError(f"{trial} times nothing; it takes a prompt token, two new tokens and a run at least")
    if (needed := trial.prompt_tokens + trial.new_tokens) > context_of(model):
        raise UsageError(f"a prompt and answer of {needed} tokens exceed the model's context of {context_of(model)}")


def _run(model: PreTrainedModel, trial: Trial) -> tuple[float, float]:
    """(seconds until the first token, mean seconds between tokens)."""
    generator = torch.Generator().manual_seed(trial.seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, trial.prompt_tokens), generator=generator).to(model.device)
    config = GenerationConfig(
        max_new_tokens=trial.new_tokens,
        min_new_tokens=trial.new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    arrivals = _Arrivals()
    begin = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config, streamer=arrivals)
    first, *rest = arrivals.times[1:]  # the prompt itself comes first
    return first - begin, (rest[-1] - first) / len(rest)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """torch computing on `number` threads, and on as many as before afterwards; None leaves them alone."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak start anew, where the system can (CUDA; Linux by `/proc/self/clear_refs`)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or not allowed: the peak is then that of the whole life of the process
        return


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on a CUDA device; on a CPU all that this process held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _conditions(model: PreTrainedModel, trial: Trial) -> str:
    where = f"{torch.get_num_threads()} threads" if model.device.type == "cpu" else str(model.device)
    dtype = backend.name_of(model.dtype)
    return f"{dtype}, {where}, batch 1, {trial.prompt_tokens} + {trial.new_tokens} tokens, median of {trial.runs} runs"
