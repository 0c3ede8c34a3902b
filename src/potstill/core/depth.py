"""The gate of a layer that tokens may skip, as a value: mixture of depths with a threshold."""

from dataclasses import dataclass
from typing import ClassVar

from potstill.core.errors import UsageError
from potstill.core.parts import Linear, Shapes, Sublayer, kind

GATES, EXECUTED = "depth_gates", "depth_executed"  # reports [B T]: g of each token, and 1 where it runs through a layer


@kind("depth")
@dataclass(frozen=True)
class Depth(Sublayer):
    """A token runs through the layer only if its gate reaches `threshold`; else the layer does not change it.

    With h the input of the layer, w and b its gate's weight and bias,

        g = sigmoid(w h / rms(h) + b)              rms(h)^2 = mean_d h_d^2
        h' = h + f g (layer(h) - h)    if g >= threshold, else h

    f is 1, or with `unit_logit` z it is 1 / sigmoid(z): a gate whose logit is z then leaves the layer as it is. Tokens
    that run see only those of their text that run too, at their own positions. So decoding needs no later token, and a
    layer stores no keys and values of a token that skips it. `load` is the share of tokens that is expected to run;
    costs count it.

    Source: Zhang et al., MoDification (arXiv:2410.14268). Departs from the paper: `unit_logit`, and the division by
    rms(h), because the size of h differs a hundredfold between tokens, and one step of an optimizer would close gates.
    """

    reports: ClassVar[tuple[str, ...]] = (GATES, EXECUTED)

    threshold: float = 0.5
    unit_logit: float | None = None
    load: float = 1.0

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise UsageError(f"the threshold of a depth gate is {self.threshold}; choose a number of at least 0")
        if not 0 <= self.load <= 1:
            raise UsageError(f"the load of a depth gate is {self.load}; choose a share from 0 to 1")

    @classmethod
    def examples(cls) -> "tuple[Depth, ...]":
        return (cls(), cls(threshold=0.3, unit_logit=1.0))

    def shapes(self, hidden: int, linear: Linear) -> Shapes:
        """The gate's weight and bias; it is a plain linear map in every model."""
        return {"gate.weight": (1, hidden), "gate.bias": (1,)}
