"""Grouped-query attention with rotary positions (arXiv:2305.13245), as Llama and Qwen have it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from potstill.core.blueprint import Rotary
from potstill.core.errors import UsageError
from potstill.core.parts import Cost, Cut, Linear, Mixer, Shapes, check_positive, kind, prefix_names
from potstill.core.state import KeyValues, KeyValueState, WindowKeyValues
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds
from potstill.layers.rotary import rotate
from potstill.ops.attention import document_attention


@kind("attention")
@dataclass(frozen=True)
class Attention(Mixer):
    """Grouped-query attention with rotary positions: `heads` queries share `kv_heads` keys and values.

    `qk_norm` normalizes each head's queries and keys before the rotation (Qwen3). A query sees itself and the
    `window - 1` tokens before it; with `None` it sees its whole document so far. `scale` multiplies q k^T where it is
    not 1 / sqrt(head_dim). `rotary` are positions that differ from the model's own (Gemma 3 has both).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    scale: float | None = None
    rotary: Rotary | None = None

    def __post_init__(self) -> None:
        check_positive(heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        if self.heads % self.kv_heads:
            raise UsageError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise UsageError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of dimensions")
        if self.window is not None:
            check_positive(window=self.window)
        if self.scale is not None and self.scale <= 0:
            raise UsageError(f"the scale of attention is {self.scale}; it must be positive")

    @classmethod
    def examples(cls) -> "tuple[Attention, ...]":
        everything = cls(6, 3, 4, qkv_bias=True, out_bias=True, qk_norm=True, window=3, scale=0.2, rotary=Rotary(50.0))
        return (cls(6, 3, 4), everything)

    @property
    def softmax_scale(self) -> float:
        """The factor on q k^T before the softmax."""
        return float(self.head_dim**-0.5) if self.scale is None else self.scale

    def projection_widths(self) -> Mapping[str, int]:
        """Numbers per token of the queries, keys and values."""
        key_width = self.kv_heads * self.head_dim
        return {"queries": self.heads * self.head_dim, "keys": key_width, "values": key_width}

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Name and shape of each weight in a model of width `hidden`."""
        query_width, key_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = prefix_names("q", linear.shapes(hidden, query_width, bias=self.qkv_bias))
        for name in "kv":
            weights |= prefix_names(name, linear.shapes(hidden, key_width, bias=self.qkv_bias))
        weights |= prefix_names("o", linear.shapes(query_width, hidden, bias=self.out_bias))
        norms: Shapes = {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return weights | norms if self.qk_norm else weights

    def cost(self, hidden: int, seen: float, linear: Linear) -> Cost:
        """Multiply-adds of the matrices, and two per head dimension and visible token for scores and mix.

        Norms, rotations and softmax are not counted: at common widths they are well under 1 % of the rest.
        """
        visible = seen if self.window is None else min(seen, self.window)
        return super().cost(hidden, seen, linear)._replace(seen=2.0 * self.heads * self.head_dim * visible)

    def state_bytes(self, tokens: int, itemsize: int) -> int:
        """Keys and values of each token that a later one may see."""
        visible = tokens if self.window is None else min(tokens, max(self.window - 1, 1))
        return 2 * self.kv_heads * self.head_dim * visible * itemsize

    def cuts(self) -> Mapping[str, Cut]:
        """`kv_heads`: each key/value head with its query heads. transformers requires that the heads divide the
        width."""
        return {"kv_heads": Cut(self.kv_heads, ("o",), hidden_multiple=self.heads // self.kv_heads)}

    def resize(self, sizes: Mapping[str, int]) -> "Attention":
        """The same attention with `sizes["kv_heads"]` key/value heads, and as many queries for each."""
        kv_heads = sizes["kv_heads"]
        return replace(self, heads=self.heads // self.kv_heads * kv_heads, kv_heads=kv_heads)


@builds(Attention)
class GroupedAttention(nn.Module):
    """o(softmax(scale q k^T) v), causal, with `facts.heads / facts.kv_heads` query heads to each key head."""

    def __init__(self, facts: Attention, factory: PartFactory) -> None:
        super().__init__()
        self.facts, hidden = facts, factory.hidden
        query_width, key_width = facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
        self.q = factory.make_linear(hidden, query_width, bias=facts.qkv_bias)
        self.k = factory.make_linear(hidden, key_width, bias=facts.qkv_bias)
        self.v = factory.make_linear(hidden, key_width, bias=facts.qkv_bias)
        self.o = factory.make_linear(query_width, hidden, bias=facts.out_bias)
        self.q_norm = factory.make_norm(facts.head_dim) if facts.qk_norm else nn.Identity()
        self.k_norm = factory.make_norm(facts.head_dim) if facts.qk_norm else nn.Identity()

    def state(self) -> KeyValues | WindowKeyValues:
        """An empty state of this mixer."""
        return KeyValues() if self.facts.window is None else WindowKeyValues(self.facts.window)

    def forward(
        self, x: Float[Tensor, "B T D"], positions: Positions, state: KeyValueState | None = None
    ) -> tuple[Float[Tensor, "B T D"], KeyValueState | None]:
        """(mixed tokens, state). With a state, `x` continues the tokens in it, and it grows in place."""
        q, k, v = (project(x).unflatten(-1, (-1, self.facts.head_dim)) for project in (self.q, self.k, self.v))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        cos_sin = positions.get_cos_sin(self.facts.head_dim, x.dtype, self.facts.rotary)
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        if state is not None:
            k, v = state.update(k, v)
        y = attend(q, k, v, positions, scale=self.facts.softmax_scale, window=self.facts.window)
        return self._project(y.transpose(1, 2).flatten(-2), x), state

    def _project(self, y: Tensor, x: Tensor) -> Tensor:
        """The output of all heads together; `x` is the input of this mixer."""
        output: Tensor = self.o(y)
        return output


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
    """Attention over the keys that each query may see: the past of its document, or the last S keys of a state."""
    if positions.lengths is not None:
        return document_attention(
            q,
            k,
            v,
            positions.lengths,
            scale=scale,
            window=window,
            position_ids=positions.key_ids,
            prefixes=positions.prefixes,
        )
    mask = positions.get_mask(k.shape[2], window)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
