"""A token is drawn as often as it is likely."""

import pytest
import torch

from potstill.decode.sampling import (
    Sampling,
    SamplingFilters,
    penalize_repetition,
    sample_tokens,
    token_probabilities,
)


def test_even_noise_draws_each_token_as_often_as_it_is_likely() -> None:
    likely = torch.tensor([0.125, 0.0, 0.5, 0.375], dtype=torch.float64)
    noise = (torch.arange(800) + 0.5) / 800
    drawn = sample_tokens(likely.expand(800, 4), noise)
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 0, 400, 300]
    assert sample_tokens(likely[None], torch.tensor([0.0])).tolist() == [0]
    assert sample_tokens(likely[None], torch.tensor([1 - 1e-9], dtype=torch.float64)).tolist() == [3]


@pytest.mark.parametrize(
    ("filters", "likely"),
    [
        pytest.param(SamplingFilters(), [0.5, 0.25, 0.125, 0.125], id="none"),
        pytest.param(SamplingFilters(top_k=2), [2 / 3, 1 / 3, 0, 0], id="the two likeliest"),
        pytest.param(SamplingFilters(top_p=0.6), [2 / 3, 1 / 3, 0, 0], id="the likeliest up to 0.6"),
        pytest.param(SamplingFilters(top_p=0.5), [1, 0, 0, 0], id="the likeliest up to 0.5"),
        pytest.param(SamplingFilters(min_p=0.4), [2 / 3, 1 / 3, 0, 0], id="from 0.4 of the likeliest"),
        pytest.param(SamplingFilters(top_k=3, min_p=0.4), [2 / 3, 1 / 3, 0, 0], id="both"),
    ],
)
def test_filters_keep_the_likeliest_tokens_in_proportion(filters: SamplingFilters, likely: list[float]) -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log() + 7
    sampling = Sampling(vocabulary=4, stop=frozenset(), filters=filters)
    assert token_probabilities(logits, sampling)[0].tolist() == pytest.approx(likely, abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-2, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy_and_a_tie_is_drawn(temperature: float) -> None:
    sampling = Sampling(vocabulary=3, stop=frozenset(), temperature=temperature)
    logits = torch.tensor([[300.0, 310.0, -5.0], [4.0, 1.0, 4.0]])
    drawn = token_probabilities(logits, sampling)
    torch.testing.assert_close(drawn, torch.tensor([[0, 1, 0], [0.5, 0, 0.5]], dtype=torch.float64))


def test_the_repetition_penalty_divides_by_what_came_before_and_not_by_padding() -> None:
    logits, ids = torch.tensor([[2.0, -2.0, 1.0, -1.0]] * 2), torch.tensor([[0, 0, 2], [1, 3, 3]])
    mask = torch.tensor([[False, False, True], [True, True, True]])
    sampling = Sampling(vocabulary=4, stop=frozenset(), filters=SamplingFilters(repetition_penalty=2.0))
    assert penalize_repetition(logits, ids, mask, sampling).tolist() == [[2, -2, 0.5, -1], [2, -4, 1, -2]]
