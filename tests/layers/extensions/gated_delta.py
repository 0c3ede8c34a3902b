"""A recurrent mixer in one file: the gated delta rule (arXiv:2412.06464, Eq. 10), token by token.

S_t = a_t S_{t-1} + b_t (v_t - a_t S_{t-1} k_t) k_t^T,     y_t = S_t q_t
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from potstill.core.parts import Cost, Cut, Linear, Mixer, Shapes, kind, prefix_names
from potstill.core.state import RecurrentState, Tensors
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds


@kind("test_gated_delta")
@dataclass(frozen=True)
class GatedDelta(Mixer):
    """`heads` memories of `head_dim` x `head_dim`."""

    heads: int
    head_dim: int

    @classmethod
    def examples(cls) -> "tuple[GatedDelta, ...]":
        """Two sizes."""
        return (cls(3, 4), cls(1, 2))

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Projections, gates and output."""
        width, weights = self.heads * self.head_dim, Shapes()
        for name, outputs in (("q", width), ("k", width), ("v", width), ("decay", self.heads), ("rate", self.heads)):
            weights |= prefix_names(name, linear.shapes(hidden, outputs))
        return weights | prefix_names("o", linear.shapes(width, hidden))

    def cost(self, hidden: int, seen: float, linear: Linear) -> Cost:
        """Three products with the memory, whatever was seen."""
        return super().cost(hidden, seen, linear)._replace(seen=3.0 * self.heads * self.head_dim**2)

    def state_bytes(self, tokens: int, itemsize: int) -> int:
        """The memories, whatever the length."""
        return self.heads * self.head_dim**2 * itemsize

    def cuts(self) -> Mapping[str, Cut]:
        """Heads."""
        return {"delta_heads": Cut(self.heads, ("o",))}

    def resize(self, sizes: Mapping[str, int]) -> "GatedDelta":
        """Fewer heads."""
        return replace(self, heads=sizes["delta_heads"])


@builds(GatedDelta)
class GatedDeltaMixer(nn.Module):
    """The recurrence, document by document."""

    def __init__(self, facts: GatedDelta, factory: PartFactory) -> None:
        super().__init__()
        self.head_dim, hidden, width = facts.head_dim, factory.hidden, facts.heads * facts.head_dim
        self.q, self.k, self.v = (factory.make_linear(hidden, width) for _ in range(3))
        self.decay, self.rate = (factory.make_linear(hidden, facts.heads) for _ in range(2))
        self.o = factory.make_linear(width, hidden)

    def state(self) -> RecurrentState:
        """An empty memory."""
        return RecurrentState()

    def forward(
        self, x: Tensor, positions: Positions, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """(mixed tokens, state)."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v))
        inputs = (q, normalize(k, dim=-1), v, self.decay(x).sigmoid(), self.rate(x).sigmoid(), positions.starts)
        (y,) = step(None, inputs)[1] if state is None else state.advance(step, inputs)
        return self.o(y.flatten(-2)), state


def step(memory: Tensors | None, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """(memory after these tokens, outputs); a document begins with an empty memory."""
    q, k, v, decay, rate, starts = inputs
    s = q.new_zeros(len(q), *q.shape[2:], q.shape[-1]) if memory is None else memory[0]
    outputs = []
    for t in range(q.shape[1]):
        s = (decay[:, t] * ~starts[:, t, None])[..., None, None] * s
        error = v[:, t, :, :, None] - s @ k[:, t, :, :, None]
        s = s + rate[:, t, :, None, None] * error @ k[:, t, :, None, :]
        outputs.append((s @ q[:, t, :, :, None])[..., 0])
    return (s,), (torch.stack(outputs, 1),)
