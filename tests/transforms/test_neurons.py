"""Shared neurons are those that every language activates most, by hand-computed tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from potstill.transforms.neurons import (
    choose_random,
    choose_strongest,
    find_shared_neurons,
    list_fallback_layers,
    score_neurons,
    select_top,
)

SCORES = {  # two layers of five neurons
    "en": torch.tensor([[0.9, 0.1, 0.8, 0.2, 0.7], [0.9, 0.8, 0.1, 0.2, 0.3]]),
    "fr": torch.tensor([[0.1, 0.2, 0.9, 0.8, 0.7], [0.1, 0.2, 0.5, 0.9, 0.8]]),
}


def as_lists(neurons: dict[int, torch.Tensor]) -> dict[int, list[int]]:
    return {layer: ids.tolist() for layer, ids in neurons.items()}


def test_a_score_is_the_mean_magnitude_over_paraphrases() -> None:
    activations = torch.tensor([[[1.0, -2.0]], [[-3.0, 1.0]]])
    assert score_neurons(activations).tolist() == [[2.0, 1.5]]


def test_shared_neurons_are_in_the_top_of_every_language() -> None:
    # layer 0: en {0, 2, 4}, fr {2, 3, 4}; layer 1: en {0, 1, 4}, fr {2, 3, 4}
    assert as_lists(find_shared_neurons(SCORES, top=3)) == {0: [2, 4], 1: [4]}
    assert list_fallback_layers(SCORES, top=3) == []


def test_a_layer_without_a_shared_neuron_gets_the_one_of_the_best_mean_rank() -> None:
    # layer 1, top 2: en {0, 1}, fr {3, 4}; ranks en 0 1 4 3 2, fr 4 3 2 0 1, sums 4 4 6 3 3: the first of 3 and 4
    assert as_lists(find_shared_neurons(SCORES, top=2)) == {0: [2], 1: [3]}
    assert list_fallback_layers(SCORES, top=2) == [1]


def test_of_equal_scores_the_first_neurons_are_taken() -> None:
    assert select_top(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 1000))
def test_the_intersection_is_part_of_the_set_of_each_language(languages: int, top: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {str(n): torch.rand(3, 10, generator=generator) for n in range(languages)}
    fallback = list_fallback_layers(scores, top=top)
    for layer, ids in find_shared_neurons(scores, top=top).items():
        own = {name: set(select_top(values, top)[layer].nonzero()[:, 0].tolist()) for name, values in scores.items()}
        expected = set.intersection(*own.values())
        assert (set(ids.tolist()) == expected) == (layer not in fallback)
        assert len(ids) == 1 or layer not in fallback


def test_the_neurons_of_one_language_are_its_strongest() -> None:
    assert as_lists(choose_strongest(SCORES["en"], {0: 2, 1: 1})) == {0: [0, 2], 1: [0]}


def test_random_neurons_are_as_many_and_those_of_their_seed() -> None:
    counts = {0: 4, 2: 1}
    first, again, other = (choose_random(50, counts, seed=seed) for seed in (1, 1, 2))
    assert {layer: len(set(ids.tolist())) for layer, ids in first.items()} == counts
    assert as_lists(first) == as_lists(again) != as_lists(other)


@pytest.mark.parametrize("top", [1, 5, 9])
def test_one_language_shares_its_own_top(top: int) -> None:
    assert [len(ids) for ids in find_shared_neurons({"en": SCORES["en"]}, top=top).values()] == [min(top, 5)] * 2
