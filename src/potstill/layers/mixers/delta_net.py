"""DeltaNet and Gated DeltaNet: mixers with a matrix for a memory, which the delta rule corrects at every token.

    q, k, v = silu(conv(W x))        q, k of length 1        beta = sigmoid(W_b x)
    y = W_o norm(delta rule(q, k, v, beta))

(arXiv:2406.06484, Section 3.4). The gated one (arXiv:2412.06464, Section 3.4) also decays its memory, and gates its
output: the logarithm of the decay is -exp(A_log) softplus(W_a x + dt_bias), and norm(y) is multiplied by silu(W_g x).
The order of tokens comes from the recurrence, so it needs no rotary positions. `ops.delta_rule` has the formulas.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from potstill.core.errors import UsageError
from potstill.core.parts import DENSE, Cost, Cut, Linear, Mixer, Shapes, check_positive, kind, prefix_names
from potstill.core.state import RecurrentState, Tensors
from potstill.layers.norm import RMSNorm
from potstill.layers.positions import Positions
from potstill.layers.registry import PartFactory, builds
from potstill.ops.delta_rule_forms import delta_rule
from potstill.ops.precision import upcast
from potstill.ops.short_convolution import short_convolution

MEMORY_ITEMSIZE = 4
LENGTH_EPS = 1e-6  # added to the squared length of queries and keys
LARGEST_DECAY_RATE = 16.0  # exp(A_log) of fresh weights is uniform up to it
STEP_RANGE = (1e-3, 0.1)  # and softplus(dt_bias) log-uniform in this range


@kind("delta_net")
@dataclass(frozen=True)
class DeltaNet(Mixer):
    """`value_heads` memories of `head_dim` x `value_dim`; `value_heads / heads` of them share queries and keys.

    `gated` adds the decay and the gate of the output. A convolution reads the last `conv_width` tokens. With
    `allow_neg_eigval` beta goes up to 2. `norm_eps` is the epsilon of the norm of each head's output.
    """

    heads: int
    value_heads: int
    head_dim: int
    value_dim: int
    gated: bool = False
    conv_width: int = 4
    allow_neg_eigval: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_positive(heads=self.heads, value_heads=self.value_heads, head_dim=self.head_dim)
        check_positive(value_dim=self.value_dim, conv_width=self.conv_width)
        if self.value_heads % self.heads:
            raise UsageError(f"value_heads {self.value_heads} is not a multiple of heads {self.heads}")
        if self.norm_eps <= 0:
            raise UsageError(f"norm_eps is {self.norm_eps}; it must be positive")

    @classmethod
    def examples(cls) -> "tuple[DeltaNet, ...]":
        """The plain one, and a gated one with all options."""
        return (cls(3, 3, 4, 4), cls(2, 4, 6, 3, gated=True, conv_width=2, allow_neg_eigval=True))

    def projection_widths(self) -> Mapping[str, int]:
        """Numbers per token of the queries, keys and values."""
        key_width = self.heads * self.head_dim
        return {"queries": key_width, "keys": key_width, "values": self.value_heads * self.value_dim}

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """Name and shape of each weight in a model of width `hidden`; beta and decay have plain matrices."""
        key_width, value_width = self.heads * self.head_dim, self.value_heads * self.value_dim
        gates: Shapes = {"A_log": (self.value_heads,), "dt_bias": (self.value_heads,)} if self.gated else {}
        weights: Shapes = gates | {}
        for name, width in (("q", key_width), ("k", key_width), ("v", value_width)):
            weights |= prefix_names(name, linear.shapes(hidden, width))
            weights[f"{name}_conv.weight"] = (width, self.conv_width)
        weights |= prefix_names("rate", DENSE.shapes(hidden, self.value_heads))
        if self.gated:
            weights |= prefix_names("decay", DENSE.shapes(hidden, self.value_heads))
            weights |= prefix_names("gate", linear.shapes(hidden, value_width))
        weights["norm.weight"] = (self.value_dim,)
        return weights | prefix_names("o", linear.shapes(value_width, hidden))

    def cost(self, hidden: int, seen: float, linear: Linear) -> Cost:
        """Multiply-adds of the matrices, and three products with the memory, however many tokens it has seen.

        Convolutions, norms and gates are not counted: at common widths they are well under 1 % of the rest. Chunks of
        C tokens take about C (2 K + V) more for each head, and no other form trains faster.
        """
        convolutions = self.conv_width * sum(self.projection_widths().values())
        matrices = super().cost(hidden, seen, linear).matrices - convolutions
        return Cost(matrices, 3.0 * self.value_heads * self.head_dim * self.value_dim)

    def state_bytes(self, tokens: int, itemsize: int) -> int:
        """The memories in float32, and the last inputs of the convolutions."""
        memories = self.value_heads * self.head_dim * self.value_dim
        return MEMORY_ITEMSIZE * memories + itemsize * (self.conv_width - 1) * sum(self.projection_widths().values())

    def cuts(self) -> Mapping[str, Cut]:
        """`delta_heads`: each key head with its value heads."""
        return {"delta_heads": Cut(self.heads, ("o",))}

    def resize(self, sizes: Mapping[str, int]) -> "DeltaNet":
        """The same mixer with `sizes["delta_heads"]` key heads, and as many value heads for each."""
        heads = sizes["delta_heads"]
        return replace(self, heads=heads, value_heads=self.value_heads // self.heads * heads)


class ShortConvolution(nn.Module):
    """The weights of a causal convolution over `width` tokens, each channel by itself."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.draw_weight()

    def draw_weight(self, std: float = 0.0, rng: torch.Generator | None = None) -> None:
        """Draws fresh weights from U(-1 / sqrt(W), 1 / sqrt(W)), as torch's convolutions do; `std` plays no part."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound, generator=rng)


@builds(DeltaNet)
class DeltaNetMixer(nn.Module):
    """W_o norm(y) of the delta rule's outputs y, with silu(W_g x) as a factor if it is gated."""

    def __init__(self, facts: DeltaNet, factory: PartFactory) -> None:
        super().__init__()
        self.facts, hidden = facts, factory.hidden
        key_width, value_width = facts.heads * facts.head_dim, facts.value_heads * facts.value_dim
        if facts.gated:
            self.A_log = nn.Parameter(torch.zeros(facts.value_heads))
            self.dt_bias = nn.Parameter(torch.zeros(facts.value_heads))
        self.q, self.q_conv = factory.make_linear(hidden, key_width), ShortConvolution(key_width, facts.conv_width)
        self.k, self.k_conv = factory.make_linear(hidden, key_width), ShortConvolution(key_width, facts.conv_width)
        self.v, self.v_conv = factory.make_linear(hidden, value_width), ShortConvolution(value_width, facts.conv_width)
        self.rate = nn.Linear(hidden, facts.value_heads, bias=False)
        if facts.gated:
            self.decay = nn.Linear(hidden, facts.value_heads, bias=False)
            self.gate = factory.make_linear(hidden, value_width)
        self.norm = RMSNorm(facts.value_dim, eps=facts.norm_eps)
        self.o = factory.make_linear(value_width, hidden)

    @torch.no_grad()
    def draw_weight(self, std: float = 0.0, rng: torch.Generator | None = None) -> None:
        """Draws fresh decays; `std` plays no part.

        exp(A_log) is uniform in (0, 16] and softplus(dt_bias) log-uniform in [0.001, 0.1], as in Mamba-2 and the
        authors' code.
        """
        if self.facts.gated:
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1e-3, LARGEST_DECAY_RATE, generator=rng).log_())
            smallest, largest = map(math.log, STEP_RANGE)
            steps = torch.empty_like(self.dt_bias).uniform_(smallest, largest, generator=rng).exp_()
            self.dt_bias.copy_(invert_softplus(steps))

    def state(self) -> RecurrentState:
        """An empty state of this mixer."""
        return RecurrentState()

    def forward(
        self, x: Float[Tensor, "B T D"], positions: Positions, state: RecurrentState | None = None
    ) -> tuple[Float[Tensor, "B T D"], RecurrentState | None]:
        """(mixed tokens, state). A document starts with an empty memory; padding changes no memory."""
        if positions.token_mask is not None:
            x = x * positions.is_token[..., None].to(x.dtype)
        inputs = (self.q(x), self.k(x), self.v(x), *self._compute_rates(x, positions), positions.starts)
        (y,) = self.advance(None, inputs)[1] if state is None else state.advance(self.advance, inputs)
        y = self.norm(y)
        if self.facts.gated:
            y = (y * silu(upcast(self.gate(x))).unflatten(-1, y.shape[-2:])).to(x.dtype)
        return self.o(y.flatten(-2)), state

    # the lengths of documents decide the shapes of its products
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def advance(self, memory: Tensors | None, inputs: Tensors) -> tuple[Tensors, Tensors]:
        """((memory, tails of the convolutions) after these tokens, outputs of the delta rule `[B T H V]`)."""
        *projections, beta, gate, starts = inputs
        matrix, *tails = (None,) * 4 if memory is None else memory
        convolutions, mixed, last_tails = (self.q_conv, self.k_conv, self.v_conv), [], []
        for values, convolution, tail in zip(projections, convolutions, tails, strict=True):
            y, last_tail = short_convolution(values, convolution.weight, tail, starts=starts)
            mixed.append(y)
            last_tails.append(last_tail)
        q, k = (_normalize(y.unflatten(-1, (self.facts.heads, -1))) for y in mixed[:2])
        shared = self.facts.value_heads // self.facts.heads
        q, k = (y if shared == 1 else y.repeat_interleave(shared, 2) for y in (q, k))
        v = mixed[2].unflatten(-1, (self.facts.value_heads, -1))
        y, matrix = delta_rule(q, k, v, beta, matrix, gate=gate if self.facts.gated else None, starts=starts)
        return (matrix, *last_tails), (y,)

    def _compute_rates(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """(beta, logarithm of the decay) `[B T H]`; both are 0 at padding."""
        beta = upcast(self.rate(x)).sigmoid() * (2 if self.facts.allow_neg_eigval else 1)
        gate = torch.zeros_like(beta)
        if self.facts.gated:
            gate = -upcast(self.A_log).exp() * softplus(upcast(self.decay(x)) + self.dt_bias)
        if positions.token_mask is None:
            return beta, gate
        is_token = positions.is_token[..., None]
        return beta * is_token, gate * is_token


def invert_softplus(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """y with softplus(y) = x."""
    return x + torch.log(-torch.expm1(-x))


def _normalize(x: Tensor) -> Tensor:
    """Each head's vector with length 1, in float32 at least."""
    x = upcast(x)
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + LENGTH_EPS)
