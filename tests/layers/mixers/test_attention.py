"""The attention layer: Llama's and Qwen3's own modules, and the same with and without a state."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from potstill.core.blueprint import Rotary
from potstill.layers.mixers.attention import Attention, GroupedAttention
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory
from potstill.ops.attention import document_lengths

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}

FACTORY = PartFactory(32, partial(RMSNorm, eps=1e-5))


def places(ids: Tensor, *, past: int = 0) -> Positions:
    return Positions(ids, Rotary(), 64, lengths=None if past else document_lengths(ids), past_length=past)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_is_the_stock_layer_of_the_same_weights(bias: bool, qk_norm: bool) -> None:
    if qk_norm:
        config = Qwen3Config(
            **SIZES, head_dim=8, attention_bias=bias, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 1e4}
        )
        theirs: nn.Module = Qwen3Attention(config, 0)
    else:
        theirs = LlamaAttention(LlamaConfig(**SIZES, attention_bias=bias), 0)
    for weight in theirs.parameters():
        nn.init.normal_(weight, 0.0, 0.3)
    theirs.config._attn_implementation = "sdpa"
    facts = Attention(4, 2, 8, qkv_bias=bias, out_bias=bias, qk_norm=qk_norm)
    ours = GroupedAttention(facts, FACTORY)
    ours.load_state_dict({name.replace("_proj", ""): weight for name, weight in theirs.state_dict().items()})
    x, positions = torch.randn(2, 9, 32), places(torch.arange(9).expand(2, -1))
    cos, sin = positions.get_cos_sin(8, torch.float32)
    stock, _ = theirs(x, position_embeddings=(cos[:, 0], sin[:, 0]), attention_mask=None)
    torch.testing.assert_close(ours(x, positions)[0], stock, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1]])
def test_text_in_pieces_through_a_state_gives_what_the_whole_gives(window: int | None, pieces: list[int]) -> None:
    layer = GroupedAttention(Attention(4, 2, 8, window=window), FACTORY).double()
    x, ids, state = torch.randn(2, 9, 32).double(), torch.arange(9).expand(2, -1), layer.state()
    whole, none = layer(x, places(ids))
    outputs, past = [], 0
    for size in pieces:
        y, state = layer(x[:, past : past + size], places(ids[:, past : past + size], past=past), state)
        outputs.append(y)
        past += size
    assert none is None
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
