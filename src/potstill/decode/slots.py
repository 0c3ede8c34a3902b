"""A cache with a row for each of several texts."""

from collections.abc import Sequence
from typing import Any

from transformers.cache_utils import Cache

from potstill.core.depth_state import DepthState
from potstill.core.errors import UnsupportedModel
from potstill.core.state import KeyValues, RecurrentState, State, WindowKeyValues
from potstill.decode.slot_layers import DepthRows, KeyValueRows, MemoryRows, RowRange, SlotLayout

INITIAL_CAPACITY = 256  # tokens per row
LAYERS: dict[type, Any] = {
    KeyValues: KeyValueRows,
    WindowKeyValues: KeyValueRows,
    RecurrentState: MemoryRows,
    DepthState: DepthRows,
}


class SlotCache(Cache):
    """A Hugging Face cache of `num_rows` rows for layers with these states. Call `begin` before each pass of the model.

    Raises: UnsupportedModel for a state of another type.
    """

    def __init__(self, states: Sequence[State], num_rows: int) -> None:
        if unknown := {type(state).__name__ for state in states if type(state) not in LAYERS}:
            raise UnsupportedModel(f"texts cannot share a state of type {', '.join(sorted(unknown))}")
        self.layout = SlotLayout(num_rows, INITIAL_CAPACITY)
        super().__init__(layers=[LAYERS[type(state)](self.layout, state) for state in states])

    @property
    def takes_trees(self) -> bool:
        """Whether all layers hold keys and values, which any path of a tree can keep."""
        return all(layer.takes_trees for layer in self.layers)

    def begin(self, current: RowRange) -> None:
        """Prepares a pass: the buffers double until the longest row fits."""
        self.layout.current = current
        if current.span > self.layout.capacity:
            while current.span > self.layout.capacity:
                self.layout.capacity *= 2
            for layer in self.layers:
                layer.resize(self.layout.capacity)

    def keep(self, row: int, length: int, positions: Sequence[int]) -> None:
        """Commits new tokens of a row that holds `length` tokens: those with the indices `positions`, a path."""
        for layer in self.layers:
            layer.keep(row, length, positions)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the text of the row `source`, of `length` tokens, into the row `target`."""
        for layer in self.layers:
            layer.copy(source, target, length)

    def move(self, source: int, target: int, length: int) -> None:
        """Moves the text of the row `source`, of `length` tokens, into the row `target`."""
        for layer in self.layers:
            layer.move(source, target, length)

    def clear(self, row: int, start: int = 0) -> None:
        """Forgets the tokens of a row from the index `start` on."""
        for layer in self.layers:
            layer.clear(row, start)
