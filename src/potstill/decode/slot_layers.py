"""The memory of several texts in each kind of layer: a row for each text, in buffers that stay where they are.

An attention holds keys and values `[R G C K]`: R rows with room for C tokens. A pass writes its new tokens behind those
that a row holds, and attention reads a view of the filled part. Nothing is copied per token; when a text outgrows the
buffers, their length doubles. A recurrence holds the memory `[R ...]` of the committed tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from potstill.core.depth_state import DepthState, ExecutedTokens
from potstill.core.errors import UsageError
from potstill.core.state import RecurrentState, State, Step, Tensors


@dataclass(frozen=True)
class RowRange:
    """Where a pass of `width` tokens writes and reads: ascending `rows` that hold `lengths` tokens so far."""

    rows: Sequence[int]
    lengths: Sequence[int]
    width: int

    @property
    def span(self) -> int:
        """The number of tokens that the longest row holds after the pass."""
        return max(self.lengths) + self.width

    @property
    def is_contiguous(self) -> bool:
        """Whether no row is missing between the first and the last."""
        return self.rows[-1] - self.rows[0] + 1 == len(self.rows)

    def select(self, buffer: Tensor) -> Tensor:
        """The rows `[B ...]` of a buffer `[R ...]`: a view if they are contiguous."""
        if self.is_contiguous:
            return buffer[self.rows[0] : self.rows[-1] + 1]
        return buffer[list(self.rows)]

    def write(self, buffer: Tensor, states: Tensor) -> None:
        """Writes the new `[B G T K]` keys or values into the buffer `[R G C K]`."""
        for index, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            buffer[row, :, length : length + self.width] = states[index]


@dataclass
class SlotLayout:
    """What all layers share: the number of rows, the tokens that each has room for, and the current pass."""

    num_rows: int
    capacity: int
    current: RowRange = RowRange([0], [0], 0)


class SlotLayer(CacheLayerMixin):
    """The memory of one layer. `empty_state` is its state for one text alone."""

    takes_trees: ClassVar[bool]

    def __init__(self, layout: SlotLayout, empty_state: State) -> None:
        super().__init__()
        self.layout = layout

    def get_seq_length(self) -> int:
        """The number of tokens in the longest row of the pass, before the pass."""
        return max(self.layout.current.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys, offset 0)."""
        return self.layout.current.span, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def record(self, on: bool = True) -> None:
        """Does nothing, because new tokens count only once `keep` commits them."""

    def resize(self, capacity: int) -> None:
        """Does nothing, unless the memory grows with its text."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of the row `source` into the row `target`."""
        raise NotImplementedError

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a text into the row `target`; the row `source` is cleared afterwards."""
        self.copy(source, target, length)

    def commit(self, n: int) -> None:
        """Always raises, because texts of different lengths share the layer.

        Raises: UsageError.
        """
        raise UsageError(f"the slots of this cache cannot all keep {n} tokens; commit each text with its reader")


class KeyValueRows(SlotLayer):
    """The keys and values of one layer."""

    is_sliding = False
    takes_trees = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes the buffers, filled with zeros, since a masked NaN would still spoil a sum."""
        self.keys, self.values = (
            states.new_zeros(self.layout.num_rows, states.shape[1], self.layout.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new `[B G T K]` keys and values; returns those of the whole rows, `[B G span K]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = self.layout.current
        rows.write(self.keys, key_states)
        rows.write(self.values, value_states)
        keys, values = (rows.select(buffer[:, :, : rows.span]) for buffer in self.buffers)
        return keys.to(key_states.dtype), values.to(value_states.dtype)  # buffers of the pass in C are float32

    @property
    def buffers(self) -> list[Tensor]:
        """The keys and the values, once there are any."""
        return [self.keys, self.values] if self.is_initialized else []

    def resize(self, capacity: int) -> None:
        """Gives every row room for `capacity` tokens."""
        if self.is_initialized:
            self.keys, self.values = (_widen(buffer, capacity) for buffer in self.buffers)

    def keep(self, row: int, length: int, positions: Sequence[int]) -> None:
        """Moves the new tokens at `length + positions` of a row together, so that they begin at `length`."""
        if is_chain(positions):
            return
        for buffer in self.buffers:
            indices = torch.tensor(positions, device=buffer.device) + length
            buffer[row, :, length : length + len(positions)] = buffer[row, :, indices]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of the row `source` into the row `target`."""
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def clear(self, row: int, start: int) -> None:
        """Writes zeros into a row from a token on, so that no NaN of its text reaches the next one."""
        for buffer in self.buffers:
            buffer[row, :, start:].zero_()


@dataclass(frozen=True)
class RecurrentPass:
    """What a recurrence read in a pass over `rows`: the inputs `[B T ...]` of its step, and the memory after them."""

    rows: Sequence[int]
    step: Step
    inputs: Tensors
    memory: Tensors

    def compute_memory(self, rows: Sequence[int], buffers: Tensors, count: int) -> Tensors:
        """The memories `[N ...]` of `rows` after `count` of their new tokens; `buffers` hold those before them."""
        indices = [self.rows.index(row) for row in rows]
        if count == self.inputs[0].shape[1]:
            return tuple(x[indices] for x in self.memory)
        before = tuple(buffer[list(rows)] for buffer in buffers)
        return self.step(before, tuple(x[indices, :count] for x in self.inputs))[0] if count else before


class MemoryRows(SlotLayer, RecurrentState):
    """The memories of one recurrent layer after the committed tokens. A pass begins there and changes none of them.

    What `keep` commits is computed before it is read, for all rows that keep equally many tokens together.
    """

    takes_trees = False

    def __init__(self, layout: SlotLayout, empty_state: RecurrentState) -> None:
        super().__init__(layout, empty_state)
        self._buffers: Tensors = ()
        self._passes: dict[int, RecurrentPass] = {}  # the last one of each row
        self._kept: dict[int, int] = {}  # by row, the number of its new tokens to commit

    @property
    def buffers(self) -> Tensors:
        """The memories `[R ...]` after the committed tokens, once there are any."""
        self._settle()
        return self._buffers

    def advance(self, step: Step, inputs: Tensors) -> Tensors:
        """The outputs of `step` on the inputs of the new tokens, after the memory of each row."""
        rows = self.layout.current
        memory, outputs = step(tuple(rows.select(buffer) for buffer in self.buffers) or None, inputs)
        self._passes |= dict.fromkeys(rows.rows, RecurrentPass(rows.rows, step, inputs, memory))
        if not self._buffers:
            self._buffers = tuple(x.new_zeros(self.layout.num_rows, *x.shape[1:]) for x in memory)
        return outputs

    def keep(self, row: int, length: int, positions: Sequence[int]) -> None:
        """Commits the first of the new tokens of a row."""
        assert is_chain(positions), "a recurrence keeps the first of its new tokens"
        self._kept[row] = len(positions)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the row `source` into the row `target`."""
        for buffer in self.buffers:
            buffer[target] = buffer[source]

    def clear(self, row: int, start: int) -> None:
        """Forgets the text of a row; a row that keeps its first `start` tokens keeps its memory."""
        for buffer in self.buffers if start == 0 else ():
            buffer[row].zero_()

    @torch.no_grad()
    def _settle(self) -> None:
        """Writes the memories of what was kept into the buffers."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, count in self._kept.items():
            groups.setdefault((id(self._passes[row]), count), []).append(row)
        for (_, count), rows in groups.items():
            memory = self._passes[rows[0]].compute_memory(rows, self._buffers, count)
            for buffer, new_rows in zip(self._buffers, memory, strict=True):
                buffer[rows] = new_rows
        for row in self._kept:
            del self._passes[row]
        self._kept.clear()


class DepthRows(SlotLayer, DepthState):
    """The tokens of each row that ran through a layer with a depth gate, in a mixer's state for each row."""

    takes_trees = False
    buffers: Tensors = ()  # there are none: each row runs other tokens

    def __init__(self, layout: SlotLayout, empty_state: DepthState) -> None:
        DepthState.__init__(self, empty_state.empty_state)
        self.layout = layout
        self.texts_by_row: dict[int, ExecutedTokens] = {}

    def open_texts(self, position_ids: Int[Tensor, "B T"]) -> list[ExecutedTokens]:
        """The committed tokens of each row of the pass that ran, and those of this pass so far."""
        for row, length in zip(self.layout.current.rows, self.layout.current.lengths, strict=True):
            if row not in self.texts_by_row:
                self.texts_by_row[row] = ExecutedTokens.begin(self.empty_state)
                self.texts_by_row[row].state.record()
            if self.texts_by_row[row].length != length:  # of a pass that was not committed
                self.texts_by_row[row].commit(length)
        return [self.texts_by_row[row] for row in self.layout.current.rows]

    def keep(self, row: int, length: int, positions: Sequence[int]) -> None:
        """Commits the first of the new tokens of a row."""
        self.texts_by_row[row].commit(length + len(positions))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the text of the row `source`, with a state of its own, into the row `target`."""
        self.texts_by_row[target] = self.texts_by_row[source].copy()

    def move(self, source: int, target: int, length: int) -> None:
        """Moves the text of the row `source` into the row `target`."""
        self.texts_by_row[target] = self.texts_by_row.pop(source)

    def clear(self, row: int, start: int) -> None:
        """Forgets the text of a row; a row that keeps its first `start` tokens keeps all of them."""
        if start == 0:
            self.texts_by_row.pop(row, None)


def is_chain(positions: Sequence[int]) -> bool:
    """Whether new tokens with these indices are the first ones, in order."""
    return all(index == position for index, position in enumerate(positions))


def _widen(buffer: Tensor, capacity: int) -> Tensor:
    wide = buffer.new_zeros(*buffer.shape[:2], capacity, buffer.shape[3])
    wide[:, :, : buffer.shape[2]] = buffer
    return wide
