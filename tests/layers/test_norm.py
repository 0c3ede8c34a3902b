"""RMSNorm: its formula, and the rounding of the stock models to the bit."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from potstill.layers.norm import RMSNorm


def test_it_divides_by_the_root_of_the_mean_square_and_scales() -> None:
    norm = RMSNorm(2, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 10.0])
    x = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(norm(x), torch.tensor([3.0, 40.0]) / 13.0**0.5)  # (9 + 16) / 2 + 0.5 = 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("zero_centred", [False, True])
def test_it_rounds_as_llama_does_and_zero_centred_as_gemma(zero_centred: bool, dtype: torch.dtype) -> None:
    stock = Gemma3RMSNorm if zero_centred else LlamaRMSNorm
    ours, theirs = RMSNorm(16, eps=1e-5, zero_centered=zero_centred).to(dtype), stock(16, eps=1e-5).to(dtype)
    x = torch.randn(3, 5, 16)
    assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))  # fresh weights too
    ours.weight.data = theirs.weight.data = torch.randn(16).to(dtype)
    assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))
    assert ours(x.to(dtype)).dtype is dtype
