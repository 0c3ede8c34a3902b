"""The state of a layer that tokens may skip."""

import copy
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.state import State


@dataclass
class ExecutedTokens:
    """The tokens of one text that ran through the layer.

    `state` is the mixer's state of them, `slots` are their indices in the row, `positions` their positions in pieces.
    `length` counts the skipped ones too.
    """

    state: State
    slots: list[int] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    length: int = 0

    @classmethod
    def begin(cls, empty_state: State) -> "ExecutedTokens":
        """A text without a token."""
        return cls(copy.deepcopy(empty_state))

    def extend(self, slots: Iterable[int], position_ids: Int[Tensor, " N"]) -> None:
        """Adds the tokens that the mixer has put into the state."""
        self.slots.extend(slots)
        self.positions.append(position_ids)

    def get_positions(self) -> Int[Tensor, " P"]:
        """Their positions; there has to be a token."""
        self.positions = [torch.cat(self.positions)]
        return self.positions[0]

    def commit(self, n: int) -> None:
        """Keeps those of the first `n` positions of the row."""
        count = bisect_left(self.slots, n)
        self.state.commit(count)
        if count < len(self.slots):
            self.slots, self.positions = self.slots[:count], [self.get_positions()[:count]]
        self.length = n

    def copy(self) -> "ExecutedTokens":
        """The same tokens in a state of their own."""
        state: Any = copy.copy(self.state)
        state.batch_select_indices(torch.zeros(1, dtype=torch.long))
        return ExecutedTokens(state, [*self.slots], [*self.positions], self.length)


class DepthState(CacheLayerMixin):
    """For each row of a batch, the mixer's state of the tokens that ran. It counts all positions.

    `empty_state` is a fresh state of the mixer. Rows have states of their own, because each runs other tokens.
    """

    is_croppable = True

    def __init__(self, empty_state: State) -> None:
        super().__init__()
        self.empty_state = empty_state
        self.texts: list[ExecutedTokens] = []

    def open_texts(self, position_ids: Int[Tensor, "B T"]) -> list[ExecutedTokens]:
        """The tokens that ran so far, of each row."""
        if not self.texts:
            self.texts = [ExecutedTokens.begin(self.empty_state) for _ in position_ids]
        return self.texts

    def advance(self, position_ids: Int[Tensor, "B T"]) -> None:
        """Counts the positions of a pass, whether or not their tokens ran."""
        for text in self.open_texts(position_ids):
            text.length += position_ids.shape[1]

    def get_seq_length(self) -> int:
        """The number of positions, those of skipped tokens included."""
        return self.texts[0].length if self.texts else 0

    def record(self, on: bool = True) -> None:
        """Starts, or stops, recording in the state of every row."""
        for state in (self.empty_state, *(text.state for text in self.texts)):
            state.record(on)

    def commit(self, n: int) -> None:
        """Keeps the first `n` positions, and of their tokens those that ran.

        Raises:
            UsageError: it holds fewer than `n`, or the state of a row cannot go back to them.
        """
        if not 0 <= n <= self.get_seq_length():
            raise UsageError(f"cannot keep the first {n} positions of a state that holds {self.get_seq_length()}")
        for text in self.texts:
            text.commit(n)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` positions; Hugging Face's assisted generation calls it."""
        self.commit(self.get_seq_length() - abs(tokens_to_remove))

    def activate_past_recording(self) -> None:
        """Hugging Face's name for `record`."""
        self.record()

    def reset(self) -> None:
        """Forgets everything."""
        self.texts = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` of the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows `indices` of the batch."""
        rows = torch.arange(len(self.texts), device=indices.device)[indices].tolist()
        self.texts = [self.texts[row].copy() for row in rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times."""
        self.texts = [text.copy() for text in self.texts for _ in range(repeats)]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: the states of the rows initialize themselves."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Always raises, because the rows have different numbers of keys.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel("a layer without a depth gate was given the state of one; use make_states()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of positions with those to come, offset 0), from which stock models make masks."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1
