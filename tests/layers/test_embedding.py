"""The embedding: its vectors, scaled and rounded as Gemma's are."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from potstill.layers.embedding import ScaledEmbedding


def test_a_vector_is_its_row_times_the_scale() -> None:
    embed = ScaledEmbedding(2, 3, scale=2.0)
    embed.weight.data = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert embed(torch.tensor([[1, 0]])).tolist() == [[[8.0, 10.0, 12.0], [2.0, 4.0, 6.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_is_rounded_as_gemma_rounds_it(dtype: torch.dtype) -> None:
    ours = ScaledEmbedding(9, 16, scale=3072**0.5).to(dtype)
    theirs = Gemma3TextScaledWordEmbedding(9, 16, None, embed_scale=3072**0.5).to(dtype)
    theirs.weight = ours.weight
    ids = torch.arange(9)[None]
    assert torch.equal(ours(ids), theirs(ids))
    assert ours(ids).dtype is dtype
