"""Attention with a gate on the output of its heads (arXiv:2505.06708, Eq. 5), as Qwen3-Next and Qwen3.5 have it."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from potstill.core.parts import Linear, Shapes, kind, prefix_names
from potstill.layers.mixers.attention import Attention, GroupedAttention
from potstill.layers.registry import PartFactory, builds


@kind("gated_attention")
@dataclass(frozen=True)
class GatedAttention(Attention):
    """Grouped-query attention whose heads are multiplied by sigmoid(W_g x), element by element, before the output."""

    @classmethod
    def examples(cls) -> "tuple[GatedAttention, ...]":
        return (cls(6, 3, 4, qkv_bias=True, qk_norm=True),)

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Those of the attention, and the gate's, which has a bias where queries have one."""
        gate = linear.shapes(hidden, self.heads * self.head_dim, bias=self.qkv_bias)
        return super().shapes(hidden, linear) | prefix_names("gate", gate)


@builds(GatedAttention)
class GatedGroupedAttention(GroupedAttention):
    """o(softmax(scale q k^T) v * sigmoid(W_g x)), causal."""

    def __init__(self, facts: GatedAttention, factory: PartFactory) -> None:
        super().__init__(facts, factory)
        self.gate = factory.make_linear(factory.hidden, facts.heads * facts.head_dim, bias=facts.qkv_bias)

    def _project(self, y: Float[Tensor, "B T E"], x: Float[Tensor, "B T D"]) -> Tensor:
        return super()._project(y * self.gate(x).sigmoid(), x)
