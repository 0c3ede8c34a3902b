"""The gated feed-forward (arXiv:2002.05202, Eq. 6)."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from potstill.core.blueprint import SwiGLU
from potstill.core.errors import UnsupportedModel


class GatedFeedForward(nn.Module):
    """down(activation(gate x) * up x)."""

    def __init__(self, facts: SwiGLU, hidden: int) -> None:
        super().__init__()
        if facts.activation not in ACT2FN:
            raise UnsupportedModel(f"activation {facts.activation!r} is not known to transformers")
        self.gate = nn.Linear(hidden, facts.width, bias=facts.bias)
        self.up = nn.Linear(hidden, facts.width, bias=facts.bias)
        self.down = nn.Linear(facts.width, hidden, bias=facts.bias)
        self.activation = ACT2FN[facts.activation]

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Each token by itself."""
        y: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return y
