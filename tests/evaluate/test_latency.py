import time

import pytest
import torch
from torch import nn

from potstill.core.errors import UsageError
from potstill.core.memory import get_peak_memory, reset_peak_memory, trim_memory
from potstill.evaluate.latency import LatencyConfig, time_model, use_threads

QUICK = LatencyConfig(prompt_tokens=8, new_tokens=4, runs=3)


class Slow(nn.Module):
    """A layer's feed-forward that takes its time: `long` for a prompt, `short` for a token."""

    def __init__(self, inner, *, long: float, short: float) -> None:
        super().__init__()
        self.inner, self.long, self.short = inner, long, short

    def forward(self, x):
        time.sleep(self.long if x.shape[1] > 1 else self.short)
        return self.inner(x)


def test_prefill_and_decode_are_timed_apart(tiny_llama):
    tiny_llama.model.layers[0].mlp = Slow(tiny_llama.model.layers[0].mlp, long=0.2, short=0.04)
    speed = time_model(tiny_llama, LatencyConfig(prompt_tokens=20, new_tokens=5, runs=2, warm_up=1))
    assert 20 / 0.4 < speed.prefill.min() <= speed.prefill.max() < 20 / 0.2
    assert 1 / 0.1 < speed.decode.min() <= speed.decode.max() < 1 / 0.04


def test_every_run_is_kept_and_says_under_which_conditions(tiny_llama):
    speed = time_model(tiny_llama, QUICK)
    assert speed.prefill.shape == speed.decode.shape == (3,)
    assert (speed.prefill > 0).all()
    assert (speed.decode > 0).all()
    assert speed.conditions == "float32, 1 threads, batch 1, 8 + 4 tokens, median of 3 runs"


def test_a_stop_token_does_not_end_a_run_early(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.norm.weight.zero_()  # all logits equal: greedy writes token 0
    tiny_llama.generation_config.eos_token_id = 0
    assert time_model(tiny_llama, QUICK).decode.shape == (3,)


def test_threads_are_set_for_the_run_and_given_back(tiny_llama):
    before = torch.get_num_threads()
    assert (
        "2 threads"
        in time_model(tiny_llama, LatencyConfig(prompt_tokens=2, new_tokens=2, runs=1, threads=2)).conditions
    )
    assert torch.get_num_threads() == before
    with pytest.raises(KeyError), use_threads(2):
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_model_keeps_its_mode(tiny_llama):
    time_model(tiny_llama.train(), QUICK)
    assert tiny_llama.training


@pytest.mark.parametrize(
    "trial",
    [
        LatencyConfig(prompt_tokens=0),
        LatencyConfig(new_tokens=1),
        LatencyConfig(runs=0),
        LatencyConfig(prompt_tokens=999),
    ],
)
def test_a_trial_that_cannot_be_timed_is_refused(tiny_llama, trial):
    with pytest.raises(UsageError):
        time_model(tiny_llama, trial)


def test_a_trial_shrinks_to_what_a_short_model_takes_in(tiny_llama):
    tiny_llama.config.max_position_embeddings = 100
    fitted = LatencyConfig().limit_to_context(tiny_llama)
    assert (fitted.prompt_tokens, fitted.new_tokens) == (75, 25)
    tiny_llama.config.max_position_embeddings = 4096
    assert LatencyConfig().limit_to_context(tiny_llama) == LatencyConfig()


def test_the_peak_covers_what_was_held_and_let_go():
    cpu = torch.device("cpu")
    trim_memory()  # what other tests left free and resident would hold it, and the peak would not rise
    reset_peak_memory(cpu)
    before = get_peak_memory(cpu)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    del held
    assert get_peak_memory(cpu) - before > 48 << 20
