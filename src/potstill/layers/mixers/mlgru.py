"""The token mixer of MatMul-free LM: a gated linear recurrence of each channel (arXiv:2406.02528, section 3.3).

    f_t = b + (1 - b) sigmoid(F x_t)        h_t = f_t h_{t-1} + (1 - f_t) silu(C x_t)        y_t = O (g_t h_t)

with g_t = sigmoid(G x_t). The released code has another gate, the fact `normalized_gate`: g_t = RMSNorm(G x_t)
sigmoid(h_t). It learns the bounds b of all layers together, from 0 in the first layer up to the last. Here b is a
number for each layer; l / L in layer l of L is what that code starts from. Memories and gates are in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from potstill.core.errors import UsageError
from potstill.core.parts import Cut, Linear, Mixer, Shapes, check_positive, kind, prefix_names
from potstill.core.state import RecurrentState, Tensors
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds
from potstill.ops.linear_recurrence import linear_recurrence
from potstill.ops.precision import upcast

MEMORY_ITEMSIZE = 4


@kind("mlgru")
@dataclass(frozen=True)
class MLGRU(Mixer):
    """A recurrence of `width` channels that keep at least the share `lower_bound` of their memory at every token."""

    width: int
    lower_bound: float = 0.0
    normalized_gate: bool = False

    def __post_init__(self) -> None:
        check_positive(width=self.width)
        if not 0 <= self.lower_bound < 1:
            raise UsageError(f"lower_bound is {self.lower_bound}; it is a share of the memory, from 0 to below 1")

    @classmethod
    def examples(cls) -> "tuple[MLGRU, ...]":
        """The paper's, and the released code's with a bound."""
        return (cls(9), cls(8, 0.5, normalized_gate=True))

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Name and shape of each weight in a model of width `hidden`."""
        weights: Shapes = {}
        for name in ("forget", "candidate", "gate"):
            weights |= prefix_names(name, linear.shapes(hidden, self.width))
        weights |= prefix_names("o", linear.shapes(self.width, hidden))
        return weights | {"gate_norm.weight": (self.width,)} if self.normalized_gate else weights

    def state_bytes(self, tokens: int, itemsize: int) -> int:
        """One float32 number for each channel, whatever the length."""
        return MEMORY_ITEMSIZE * self.width

    def cuts(self) -> Mapping[str, Cut]:
        """`channels`; none with a normalized gate, whose norm mixes them."""
        return {} if self.normalized_gate else {"channels": Cut(self.width, ("o",))}

    def resize(self, sizes: Mapping[str, int]) -> "MLGRU":
        """The same recurrence with `sizes["channels"]` channels."""
        return replace(self, width=sizes["channels"])


@builds(MLGRU)
class MLGRUMixer(nn.Module):
    """O (g h), the gated memory of each channel."""

    def __init__(self, facts: MLGRU, factory: PartFactory) -> None:
        super().__init__()
        self.facts = facts
        self.forget, self.candidate, self.gate = (factory.make_linear(factory.hidden, facts.width) for _ in range(3))
        self.o = factory.make_linear(facts.width, factory.hidden)
        self.gate_norm = factory.make_norm(facts.width) if facts.normalized_gate else None

    def state(self) -> RecurrentState:
        """An empty state of this mixer."""
        return RecurrentState()

    def forward(
        self, x: Float[Tensor, "B T D"], positions: Positions, state: RecurrentState | None = None
    ) -> tuple[Float[Tensor, "B T D"], RecurrentState | None]:
        """(mixed tokens, state). A document starts with an empty memory; padding changes no memory."""
        bound = self.facts.lower_bound
        forget = bound + (1 - bound) * upcast(self.forget(x)).sigmoid()
        candidate = silu(upcast(self.candidate(x)))
        update = (1 - forget) * candidate
        if positions.token_mask is not None:  # padding keeps the memory
            is_token = positions.is_token[..., None]
            forget, update = forget.where(is_token, 1.0), update.where(is_token, 0.0)
        inputs = (forget * ~positions.starts[..., None], update)
        (h,) = advance(None, inputs)[1] if state is None else state.advance(advance, inputs)
        gate = upcast(self.gate(x))
        gate = gate.sigmoid() if self.gate_norm is None else self.gate_norm(gate) * h.sigmoid()
        return self.o((gate * h).to(x.dtype)), state


def advance(memory: Tensors | None, inputs: Tensors) -> tuple[Tensors, Tensors]:
    """(memory after these tokens, the memory after each of them)."""
    forget, candidate = inputs
    h = linear_recurrence(forget, candidate, None if memory is None else memory[0])
    return (h[:, -1].clone(),), (h,)  # a view would hold the memories of all tokens
