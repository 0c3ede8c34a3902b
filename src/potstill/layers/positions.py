"""What a mixer may know of a batch besides its input and its state: where each token stands and what it may see."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from potstill.core.blueprint import Rotary
from potstill.layers.rotary import rotation
from potstill.ops.attention import Lengths, causal, starts

Turn = tuple[Tensor, Tensor]


@dataclass
class Positions:
    """The positions of one pass: `ids [B T]`, of documents of `lengths`, or of text that continues `past` tokens.

    With `lengths` no query sees another document. Without them (a state holds what came before, or `real [B S]` says
    which keys are no padding) `visible` gives the dense mask. Angles and masks are made once and shared by all layers.
    """

    ids: Int[Tensor, "B T"]
    rotary: Rotary
    context: int
    lengths: Lengths | None = None
    past: int = 0
    real: Bool[Tensor, "B S"] | None = None
    _turns: dict[tuple[Rotary, int, torch.dtype], Turn] = field(default_factory=dict)
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # made once for all layers, so in none of them
    def turn(self, head_dim: int, dtype: torch.dtype, rotary: Rotary | None = None) -> Turn:
        """Cosines and sines `[B 1 T K]` of the angles of `rotary`, by default the model's."""
        own = rotary or self.rotary
        key = (own, head_dim, dtype)
        if key not in self._turns:
            self._turns[key] = rotation(self.ids, own, head_dim=head_dim, context=self.context, dtype=dtype)
        return self._turns[key]

    def visible(self, keys: int, window: int | None) -> Bool[Tensor, "B 1 T {keys}"] | None:
        """Which keys each query may see, or None if it is all of them."""
        key = (keys, window)
        if key not in self._masks:
            self._masks[key] = self._visible(keys, window)
        return self._masks[key]

    def _visible(self, keys: int, window: int | None) -> Tensor | None:
        size, device = self.ids.shape[1], self.ids.device
        last = self.past + size
        if self.real is None and size == 1 and keys == last and (window is None or keys <= window):
            return None
        seen = torch.zeros(size, keys, dtype=torch.bool, device=device)
        seen[:, :last] = causal(size, last, window=window, device=device)
        seen = seen.expand(len(self.ids), 1, size, keys)
        if self.real is None:
            return seen
        if self.past == 0:  # later on there are only the documents' ends in the state, and rows hold one document each
            documents = starts(self.ids).cumsum(1)
            seen = seen & (documents[:, :, None] == documents[:, None, :])[:, None]
        seen = seen & self.real[:, None, None, :]
        itself = torch.arange(keys, device=device) == torch.arange(self.past, last, device=device)[:, None]
        return seen | itself  # a padding token sees at least itself: no row of the softmax is empty, none is NaN
