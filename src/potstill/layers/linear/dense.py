"""The plain linear map: `torch.nn.Linear`, whose facts are `core.parts.Linear`."""

from torch import nn

from potstill.core.parts import Linear
from potstill.layers.registry import builds


@builds(Linear)
def make_dense(facts: Linear, inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    """A map from `inputs` to `outputs` numbers."""
    return nn.Linear(inputs, outputs, bias=bias)
