"""RMSNorm: its formula, and the rounding of the stock models to the bit."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from potstill.layers.norm import RMSNorm


def test_it_divides_by_the_root_of_the_mean_square_and_scales() -> None:
    norm = RMSNorm(2, eps=0.5)
    norm.weight.data = torch.tensor([1.0, 10.0])
    x = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(norm(x), torch.tensor([3.0, 40.0]) / 13.0**0.5)  # (9 + 16) / 2 + 0.5 = 13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_rounds_as_llama_does(dtype: torch.dtype) -> None:
    ours, theirs, x = RMSNorm(16, eps=1e-5).to(dtype), LlamaRMSNorm(16, eps=1e-5).to(dtype), torch.randn(3, 5, 16)
    ours.weight.data = theirs.weight.data = torch.randn(16).to(dtype)
    assert torch.equal(ours(x.to(dtype)), theirs(x.to(dtype)))
    assert ours(x.to(dtype)).dtype is dtype
