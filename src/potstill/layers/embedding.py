"""The embedding table, with a scale."""

from jaxtyping import Float, Int
from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """scale * weight[id], the scale rounded to the weight's dtype: sqrt(3072) = 55.4 is 55.5 in bfloat16, as in Gemma.

    Source: transformers' `Gemma3TextScaledWordEmbedding`. It does not scale vectors that replace ids.
    """

    def __init__(self, vocabulary: int, hidden: int, *, scale: float = 1.0) -> None:
        super().__init__(vocabulary, hidden)
        self.scale = scale

    def forward(self, input: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        """The vector of each token."""
        vectors = super().forward(input)
        return vectors if self.scale == 1 else vectors * vectors.new_full((), self.scale)

    def extra_repr(self) -> str:
        """Sizes and scale, for printing."""
        return f"{super().extra_repr()}, scale={self.scale}"
