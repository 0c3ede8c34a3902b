"""Registers the module of each kind of part, and makes the modules of a layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from potstill.core.errors import UsageError
from potstill.core.parts import DENSE, Linear, Part

BUILDERS: dict[type[Part], Callable[..., nn.Module]] = {}

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


def builds(facts: type[Part]) -> Callable[[Builder], Builder]:
    """Registers the module of a kind.

    A mixer or feed-forward is called as `(facts, factory)`, a linear map as `(facts, inputs, outputs, bias=...)`.
    """

    def register(builder: Builder) -> Builder:
        BUILDERS[facts] = builder
        return builder

    return register


@runtime_checkable
class DrawsWeights(Protocol):
    """A module whose own weights are no matrices, biases or norms, or begin with other values than these."""

    def draw_weight(self, std: float, rng: torch.Generator | None) -> None:
        """Draws fresh weights in place; `std` is Hugging Face's `initializer_range`."""
        ...


@dataclass(frozen=True)
class PartFactory:
    """Makes the parts, linear maps and norms of one layer, in a model of width `hidden`.

    `make_norm` makes the model's norm of a given size; `linear` is the layer's kind of linear map.
    """

    hidden: int
    make_norm: Callable[[int], nn.Module]
    linear: Linear = DENSE

    def make_part(self, part: Part) -> nn.Module:
        """The module of a mixer, a feed-forward, or a part inside one."""
        return _get_builder(part)(part, self)

    def make_linear(self, inputs: int, outputs: int, *, bias: bool = False) -> nn.Module:
        """A linear map from `inputs` to `outputs` numbers."""
        return _get_builder(self.linear)(self.linear, inputs, outputs, bias=bias)


def _get_builder(part: Part) -> Callable[..., Any]:
    builder = BUILDERS.get(type(part))
    if builder is None:
        raise UsageError(f"no module builds {type(part).__name__}; register one with @builds({type(part).__name__})")
    return builder
