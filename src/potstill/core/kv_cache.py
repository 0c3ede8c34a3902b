"""What a mixer remembers of the text so far, while tokens are decoded one after another.

A state is a layer of Hugging Face's `Cache` (`CacheLayerMixin`), so that `generate` takes ours and our mixers take
theirs. Importing this module imports transformers; `core/blueprint.py` does not.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from potstill.core.errors import UsageError


@runtime_checkable
class State(Protocol):
    """The memory of one layer, grown in place by `update`."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B G T K]` keys and values; gives all of them, `[B G S K]`."""
        ...

    def get_seq_length(self) -> int:
        """How many positions it holds."""
        ...


class KeyValues(DynamicLayer):
    """The memory of attention: every key and value so far, `[B G S K]`. A window is the mixer's, not the memory's."""

    def commit(self, n: int) -> None:
        """Keep the first `n` positions: what was decoded after them was a draft that did not hold.

        Raises:
            UsageError: it holds fewer than `n`.
        """
        length = self.get_seq_length()
        if not 0 <= n <= length:
            raise UsageError(f"cannot keep the first {n} positions of a state that holds {length}")
        self.crop(n - length)
