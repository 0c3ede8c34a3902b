"""The memory of attention: it grows, gives back a draft, and Hugging Face's `generate` takes it."""

from typing import Any

import pytest
import torch
from tests.models.small import SMALL
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.state import KeyValues, RecurrentState, WindowKeyValues, commit, record


def filled(size: int) -> tuple[KeyValues, torch.Tensor]:
    state, keys = KeyValues(), torch.randn(2, 3, size, 4)
    state.update(keys, keys + 1)
    return state, keys


def test_update_appends_and_gives_everything_so_far() -> None:
    state, first = filled(3)
    second = torch.randn(2, 3, 1, 4)
    keys, values = state.update(second, second + 1)
    torch.testing.assert_close(keys, torch.cat([first, second], 2))
    torch.testing.assert_close(values, keys + 1)
    assert state.get_seq_length() == 4


@pytest.mark.parametrize("n", [0, 1, 4, 5])
def test_commit_keeps_the_first_positions(n: int) -> None:
    state, keys = filled(5)
    state.commit(n)
    assert state.get_seq_length() == n
    torch.testing.assert_close(state.keys, keys[:, :, :n])
    torch.testing.assert_close(state.values, keys[:, :, :n] + 1)


def test_a_state_emptied_by_commit_can_be_filled_again() -> None:
    state, keys = filled(5)
    state.commit(0)
    torch.testing.assert_close(state.update(keys, keys)[0], keys)


def test_committing_nothing_of_a_fresh_state_is_no_error() -> None:
    state = KeyValues()
    state.commit(0)
    assert state.get_seq_length() == 0


@pytest.mark.parametrize("n", [-1, 6])
def test_commit_refuses_what_is_not_there(n: int) -> None:
    state, _ = filled(5)
    with pytest.raises(UsageError, match=f"first {n} positions of a state that holds 5"):
        state.commit(n)


def test_generate_of_a_stock_model_takes_our_states(tiny_llama: LlamaForCausalLM) -> None:
    ids = torch.arange(3, 11)[None]
    cache = Cache(layers=[KeyValues() for _ in range(tiny_llama.config.num_hidden_layers)])
    with_ours = tiny_llama.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    without = tiny_llama.generate(ids, use_cache=False, max_new_tokens=6, do_sample=False)
    assert isinstance(cache.layers[0], CacheLayerMixin)
    assert cache.get_seq_length() == 13
    assert with_ours.tolist() == without.tolist()


def count(memory: tuple[torch.Tensor, ...] | None, inputs: tuple[torch.Tensor, ...]) -> tuple[tuple, tuple]:
    """A recurrence by hand: the running sum."""
    start = torch.zeros_like(inputs[0][:, 0]) if memory is None else memory[0]
    sums = start[:, None] + inputs[0].cumsum(1)
    return (sums[:, -1],), (sums,)


def summed(*pieces: list[float], recording_from: int = 0) -> RecurrentState:
    state = RecurrentState()
    for i, piece in enumerate(pieces):
        if i == recording_from:
            state.record()
        state.advance(count, (torch.tensor([piece]),))
    return state


def test_a_recurrence_goes_on_where_it_was() -> None:
    state = RecurrentState()
    assert state.advance(count, (torch.tensor([[1.0, 2.0]]),))[0].tolist() == [[1, 3]]
    assert state.advance(count, (torch.tensor([[4.0]]),))[0].tolist() == [[7]]
    assert state.get_seq_length() == 3


@pytest.mark.parametrize(("n", "total"), [(2, 3), (3, 6), (4, 10), (5, 15)])
def test_a_recurrence_steps_again_from_the_last_commit(n: int, total: float) -> None:
    state = summed([1.0, 2.0], [3.0, 4.0], [5.0], recording_from=1)
    state.commit(n)
    assert state.get_seq_length() == n
    assert state.memory is not None
    assert state.memory[0].item() == total
    with pytest.raises(UsageError, match=f"{n} of them committed"):
        state.commit(n - 1)


def test_a_recurrence_that_records_nothing_takes_nothing_back() -> None:
    state = summed([1.0, 2.0], recording_from=9)
    with pytest.raises(UsageError, match="call record before the draft"):
        state.commit(1)
    state.commit(2)
    state.reset()
    assert state.get_seq_length() == 0


def test_rows_of_a_recurrence_are_chosen_with_what_it_recorded() -> None:
    state = RecurrentState()
    state.record()
    state.advance(count, (torch.tensor([[1.0, 2.0], [3.0, 4.0]]),))
    state.batch_select_indices(torch.tensor([1]))
    state.batch_repeat_interleave(2)
    state.crop(-1)
    assert state.memory is not None
    assert state.memory[0].tolist() == [3, 3]


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_a_stock_cache_takes_back_a_draft(window: int | None) -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).eval()
    ids, cache = torch.randint(90, (1, 12)), DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache)
    for right in (1, 2):
        start = cache.get_seq_length()
        record(cache)
        model(ids[:, start : start + right], past_key_values=cache)
        model(torch.full((1, 2), 5), past_key_values=cache)
        commit(cache, start + right)
    record(cache, False)
    rest = model(ids[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(rest, model(ids, use_cache=False).logits[:, 9:], rtol=0, atol=1e-5)


def test_a_stock_window_without_a_record_is_refused_and_so_is_too_much() -> None:
    cache = Cache(layers=[DynamicSlidingWindowLayer(3)])
    cache.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)
    commit(cache, 5)
    with pytest.raises(UsageError, match="call record before the draft"):
        commit(cache, 4)
    with pytest.raises(UsageError, match="first 6 positions of a state that holds 5"):
        commit(cache, 6)


@pytest.mark.parametrize("make", [WindowKeyValues, DynamicSlidingWindowLayer])
@pytest.mark.parametrize("pieces", [[5], [1] * 5, [2, 3]])
def test_a_window_holds_what_the_next_token_sees_and_while_it_records_all_since_the_commit(
    make: Any, pieces: list[int]
) -> None:
    cache, keys = Cache(layers=[make(4)]), torch.arange(40.0).view(1, 1, 10, 4)
    (state,) = cache.layers
    record(cache, False)
    for piece in keys[:, :, :5].split(pieces, 2):
        state.update(piece, piece)
    torch.testing.assert_close(state.keys, keys[:, :, 2:5])
    for start in (5, 6):
        record(cache)
        state.update(keys[:, :, start : start + 1], keys[:, :, start : start + 1])
        state.update(keys[:, :, :3], keys[:, :, :3])  # a draft, all of it wrong
        commit(cache, start + 1)
        torch.testing.assert_close(state.keys, keys[:, :, start - 2 : start + 1])
        assert cache.get_seq_length() == start + 1
        with pytest.raises(UsageError, match="call record before the draft"):
            commit(cache, start)
    assert state.update(keys[:, :, 7:9], keys[:, :, 7:9])[0].shape[2] == 5
    record(cache, False)
    torch.testing.assert_close(state.keys, keys[:, :, 6:9])


def test_a_fresh_window_records_and_commits_nothing() -> None:
    state = WindowKeyValues(1)
    state.record()
    state.commit(0)
    state.record(False)
    state.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    assert state.keys.shape[2] == 1


@pytest.mark.parametrize("layer", [LinearAttentionLayer(), StaticLayer(4)])
def test_stock_layers_that_cannot_take_back_are_refused(layer: Any) -> None:
    for call in (lambda c: record(c), lambda c: commit(c, 0)):
        with pytest.raises(UnsupportedModel, match=f"{type(layer).__name__} cannot take back tokens"):
            call(Cache(layers=[layer]))
