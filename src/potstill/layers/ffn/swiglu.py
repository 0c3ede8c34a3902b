"""The gated feed-forward (arXiv:2002.05202, Eq. 6)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from potstill.core.errors import UnsupportedModel
from potstill.core.parts import Cut, FeedForward, Linear, Shapes, check_positive, kind, prefix_names
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds


@kind("swiglu")
@dataclass(frozen=True)
class SwiGLU(FeedForward):
    """down(activation(gate x) * up x), of `width` neurons; with another activation than silu it is another GLU."""

    width: int
    bias: bool = False
    activation: str = "silu"

    def __post_init__(self) -> None:
        check_positive(width=self.width)

    @classmethod
    def examples(cls) -> "tuple[SwiGLU, ...]":
        return (cls(10), cls(6, bias=True, activation="gelu"))

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Name and shape of each weight in a model of width `hidden`."""
        into = linear.shapes(hidden, self.width, bias=self.bias)
        out_of = linear.shapes(self.width, hidden, bias=self.bias)
        return prefix_names("gate", into) | prefix_names("up", into) | prefix_names("down", out_of)

    def cuts(self) -> Mapping[str, Cut]:
        """`ffn`: the neurons."""
        return {"ffn": Cut(self.width, ("down",))}

    def resize(self, sizes: Mapping[str, int]) -> "SwiGLU":
        """The same feed-forward with `sizes["ffn"]` neurons."""
        return replace(self, width=sizes["ffn"])


@builds(SwiGLU)
class GatedFeedForward(nn.Module):
    """down(activation(gate x) * up x)."""

    def __init__(self, facts: SwiGLU, factory: PartFactory) -> None:
        super().__init__()
        if facts.activation not in ACT2FN:
            raise UnsupportedModel(f"activation {facts.activation!r} is not known to transformers")
        self.gate = factory.make_linear(factory.hidden, facts.width, bias=facts.bias)
        self.up = factory.make_linear(factory.hidden, facts.width, bias=facts.bias)
        self.down = factory.make_linear(facts.width, factory.hidden, bias=facts.bias)
        self.activation = ACT2FN[facts.activation]

    def forward(self, x: Float[Tensor, "B T D"], positions: Positions) -> Float[Tensor, "B T D"]:
        """Each token by itself."""
        y: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return y
