"""A token is drawn as often as it is likely."""

import torch

from potstill.decode.sampling import sample_tokens


def test_even_noise_draws_each_token_as_often_as_it_is_likely() -> None:
    likely = torch.tensor([0.125, 0.0, 0.5, 0.375], dtype=torch.float64)
    noise = (torch.arange(800) + 0.5) / 800
    drawn = sample_tokens(likely.expand(800, 4), noise)
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 0, 400, 300]
    assert sample_tokens(likely[None], torch.tensor([0.0])).tolist() == [0]
    assert sample_tokens(likely[None], torch.tensor([1 - 1e-9], dtype=torch.float64)).tolist() == [3]
