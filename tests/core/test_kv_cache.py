"""The memory of attention: it grows, gives back a draft, and Hugging Face's `generate` takes it."""

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from potstill.core.errors import UsageError
from potstill.core.kv_cache import KeyValues


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
