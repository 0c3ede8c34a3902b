"""A longer context: other rotary frequencies, and training on long text does the rest.

With head width K, pair i of position t turns by the angle t w_i, where w_i = theta^(-2i/K). For a context s times as
long as the original L, the frequencies become

    linear   w_i / s                              position interpolation (arXiv:2306.15595, Eq. 4)
    ntk      theta' = theta s^(K / (K - 2))       the slowest pair as in linear, the fastest unchanged
    base     theta' as given, or 100 theta        a larger base (arXiv:2309.16039)
    llama3   (1 - g_i) w_i / s + g_i w_i          g_i rises from 0 at 1 turn to 1 at 4 turns, L w_i / 2 pi, of the pair
    yarn     the same, from 1 turn to 32          and q k^T is multiplied by (0.1 ln s + 1)^2 (arXiv:2309.00071)

Every result is a stock model of the same weights. None keeps the function within the original context, except at the
first token of a document. With `linear`, position s t gives what position t gave. `dynamic` would keep the function. It
is absent, because its frequencies depend on the length of the text: training and cached decoding would see others.

Departs from the paper: the ramp of `yarn` is linear in i between whole numbers, where the paper's is linear in the
turns. The official code and transformers do the same, and so does every engine that runs the saved model.
"""

from dataclasses import dataclass, replace
from typing import Any

from potstill.core.blueprint import Blueprint, Rotary
from potstill.core.errors import UsageError
from potstill.core.options import Option
from potstill.core.serialization import freeze
from potstill.core.types import Weights
from potstill.layers.mixers.attention import Attention
from potstill.transforms.convert.conversion import Conversion, register_conversion

METHODS = ("yarn", "llama3", "linear", "ntk", "base")
BASE_FACTOR = 100.0  # from 1e4 to 1e6


@register_conversion("longer", help="rotary positions for a longer context: YaRN, interpolation, NTK or a larger base")
@dataclass(frozen=True, kw_only=True)
class ToLonger(Conversion):
    """Changes the rotary frequencies of a model for `factor` times its context. No weight changes.

    Layers with a rotation of their own keep it if their window fits into the original context (Gemma 3), because they
    see no larger distance. `ntk` and `base` only change theta, so a second such conversion extends the first.
    """

    factor: float = Option(8.0, "How many times as long the context becomes.").field()
    method: str = Option("yarn", "yarn, llama3, linear (position interpolation), ntk or base.").field()
    theta: float | None = Option[float | None](
        None, "The new rotary base of method=base; by default 100 times the old one."
    ).field()

    def __post_init__(self) -> None:
        if not 1 < self.factor < float("inf"):
            raise UsageError(f"longer: factor is {self.factor:g}; choose a number above 1")
        if self.method not in METHODS:
            raise UsageError(f"longer: there is no method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.theta is not None and self.method != "base":
            raise UsageError(f"longer: theta belongs to method=base, not to method={self.method}; leave it out")

    def blueprint(self, old: Blueprint) -> Blueprint:
        """The same layers with other rotary frequencies and a longer context.

        Raises:
            UsageError: there is no rotation to change, it is scaled already, or a layer has another one.
        """
        attentions = [part for layer in old.layers for part in layer.parts() if isinstance(part, Attention)]
        shared = [part for part in attentions if part.rotary is None]
        if not shared:
            raise UsageError("no layer of the model has its shared rotary positions, so longer has nothing to change")
        if any(part.rotary is not None and (part.window or old.context + 1) > old.context for part in attentions):
            raise UsageError("longer changes one rotation, and some layers that see the whole context have another")
        if old.rotary.scaling is not None:
            raise UsageError("the model's rotary positions are scaled already; convert the original model")
        context = int(old.context * self.factor)
        if context == old.context:
            raise UsageError(f"longer: factor is {self.factor:g}, which adds no position to {old.context}; enlarge it")
        rotary = self._change_rotary(
            old, context / old.context, {old.rotary.count_rotated(part.head_dim) for part in shared}
        )
        return replace(old, rotary=rotary, context=context)

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        """The same weights."""
        return weights

    def _change_rotary(self, old: Blueprint, factor: float, head_dims: set[int]) -> Rotary:
        if self.method == "base":
            return replace(old.rotary, theta=self._choose_base(old.rotary.theta))
        if self.method == "ntk":
            return replace(old.rotary, theta=old.rotary.theta * factor ** _compute_ntk_exponent(head_dims))
        facts: dict[str, Any] = {"rope_type": self.method, "factor": factor}
        if self.method != "linear":
            facts["original_max_position_embeddings"] = old.context
        if self.method == "llama3":
            facts |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        return replace(old.rotary, scaling=freeze(facts))

    def _choose_base(self, theta: float) -> float:
        new_theta = BASE_FACTOR * theta if self.theta is None else self.theta
        if not theta < new_theta < float("inf"):
            raise UsageError(f"longer: theta={new_theta:g} is not above the model's {theta:g}; choose a larger one")
        return new_theta


def _compute_ntk_exponent(head_dims: set[int]) -> float:
    """K / (K - 2) of the heads' only width K."""
    if len(head_dims) > 1 or min(head_dims) <= 2:
        widths = ", ".join(map(str, sorted(head_dims)))
        raise UsageError(f"method=ntk needs heads of one width above 2, and this model has {widths}; choose another")
    (head_dim,) = head_dims
    return head_dim / (head_dim - 2)
