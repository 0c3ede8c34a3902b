"""The interface of a reward: a number for each document of a batch, such as a sampled completion."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from potstill.train.rollouts.base import Document


@runtime_checkable
class Reward(Protocol):
    """Scores documents: `rewards[d]` is the reward of `documents[d]`; more is better.

    A reward reads tokens, labels and declared fields. Samples of one prompt have one number in the field `groups`.
    """

    def __call__(self, documents: Sequence[Document]) -> Float[Tensor, " D"]: ...
