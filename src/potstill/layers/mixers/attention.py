"""Grouped-query attention with rotary positions (arXiv:2305.13245), as Llama and Qwen have it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from potstill.core.blueprint import Attention
from potstill.core.kv_cache import KeyValues, State
from potstill.layers.positions import Positions
from potstill.layers.rotary import rotate
from potstill.ops.attention import document_attention


class GroupedAttention(nn.Module):
    """o(softmax(q k^T / sqrt(K)) v), causal, `facts.heads / facts.kv_heads` query heads to each key head.

    `facts.scale` may stand in for 1 / sqrt(K). `norm` makes the model's kind of norm of a given size.
    """

    def __init__(self, facts: Attention, hidden: int, *, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.facts = facts
        query_width, key_width = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
        self.q = nn.Linear(hidden, query_width, bias=facts.qkv_bias)
        self.k = nn.Linear(hidden, key_width, bias=facts.qkv_bias)
        self.v = nn.Linear(hidden, key_width, bias=facts.qkv_bias)
        self.o = nn.Linear(query_width, hidden, bias=facts.out_bias)
        self.q_norm = norm(facts.head_dim) if facts.qk_norm else nn.Identity()
        self.k_norm = norm(facts.head_dim) if facts.qk_norm else nn.Identity()

    def state(self) -> KeyValues:
        """An empty memory for this mixer."""
        return KeyValues()

    def forward(
        self, x: Float[Tensor, "B T D"], positions: Positions, state: State | None = None
    ) -> tuple[Float[Tensor, "B T D"], State | None]:
        """(mixed tokens, state): with a state, `x` continues what it holds, and it is grown in place."""
        q, k, v = (project(x).unflatten(-1, (-1, self.facts.head_dim)) for project in (self.q, self.k, self.v))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        cos_sin = positions.get_cos_sin(self.facts.head_dim, x.dtype, self.facts.rotary)
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        if state is not None:
            k, v = state.update(k, v)
        y = attend(q, k, v, positions, scale=self.facts.softmax_scale, window=self.facts.window)
        return self.o(y.transpose(1, 2).flatten(-2)), state


# the lengths of documents would be compiled in, anew with every batch
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    positions: Positions,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "B H T V"]:
    """Attention over what `positions` lets each query see: its document's past, or the keys of a state."""
    if positions.lengths is not None:
        return document_attention(q, k, v, positions.lengths, scale=scale, window=window)
    mask = positions.get_mask(k.shape[2], window)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
