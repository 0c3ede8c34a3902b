"""The states of mixers (such as a KV cache) while a model decodes token by token.

A state is a layer of Hugging Face's `Cache` (`CacheLayerMixin`). So `generate` accepts potstill's states, and
potstill's mixers accept stock ones. Every state counts its positions and can roll back: call `record`, decode a draft,
then `commit(n)` to keep the first n positions. `record` and `commit` of this module do the same for a whole cache,
stock ones included.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, cat
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from potstill.core.errors import UnsupportedModel, UsageError

Tensors = tuple[Tensor, ...]
# (memory, inputs `[B T ...]` of T tokens) -> (memory after them, outputs), without changing either in place; before the
# first token the memory is None or zeros
Step = Callable[[Tensors | None, Tensors], tuple[Tensors, Tensors]]


@runtime_checkable
class State(Protocol):
    """The state of one layer."""

    def get_seq_length(self) -> int:
        """The number of positions in it."""
        ...

    def record(self, on: bool = True) -> None:
        """Starts or stops recording, which lets `commit` roll back; the current position counts as committed."""
        ...

    def commit(self, n: int) -> None:
        """Keeps the first `n` positions; later calls cannot go back before them.

        Raises:
            UsageError: the state holds fewer than `n` positions, or cannot go back to `n`.
        """
        ...


class KeyValueState(State, Protocol):
    """The state of an attention: it grows in place by `update`."""

    def update(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Appends `[B G T K]` keys and values; returns all of them, `[B G S K]`."""
        ...


class KeyValues(DynamicLayer):
    """Every key and value so far, `[B G S K]`."""

    def record(self, on: bool = True) -> None:
        """Does nothing, because this state keeps all keys and values."""

    def commit(self, n: int) -> None:
        """Keeps the first `n` positions.

        Raises:
            UsageError: it holds fewer than `n`.
        """
        length = self.get_seq_length()
        _check_commit(n, 0, length)
        self.crop(n - length)


class WindowKeyValues(DynamicSlidingWindowLayer):
    """The keys and values that a later token sees through a window: the last `window - 1`, and at least one.

    While it records, it also holds all since the last commit. The mixer masks what a token of a longer pass does not
    see.
    """

    record_past: bool

    def __init__(self, window: int) -> None:
        super().__init__(max(window, 2))

    def record(self, on: bool = True) -> None:
        """Starts, or stops, holding positions that no later one sees; the current position counts as committed."""
        if self.record_past and not on and self.is_initialized:
            self.crop(0)
        self.record_past = on

    def commit(self, n: int) -> None:
        """Keeps the first `n` positions.

        Raises:
            UsageError: it holds fewer than `n`, or no longer what the token at `n` sees.
        """
        length = self.get_seq_length()
        _check_commit(n, 0, length)
        if length and self.keys.shape[-2] - (length - n) < min(n, self.sliding_window - 1):
            raise UsageError(f"cannot keep the first {n} of {length} positions; call record before the draft")
        if n < length or (self.record_past and length):
            self.crop(n - length)


class RecurrentState(CacheLayerMixin):
    """The state of a recurrence: a memory of fixed size, which `advance` updates by a step of the mixer.

    Positions cannot be cut from a memory as from a row of keys. While it records, the state keeps the memory at the
    last commit and all later inputs; `commit` recomputes from there. All tensors have the batch as their first axis.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.memory: Tensors | None = None
        self._length, self._committed_length = 0, 0
        self._committed_memory: Tensors | None = None
        self._inputs: list[Tensors] = []
        self._is_recording = False
        self._step: Step | None = None

    def advance(self, step: Step, inputs: Tensors) -> Tensors:
        """The outputs of `step` on `inputs`; their second axis is time. Updates the memory."""
        self.memory, outputs = step(self.memory, inputs)
        self._length += inputs[0].shape[1]
        if self._is_recording:
            self._step = step
            self._inputs.append(inputs)
        else:
            self._set_committed()
        return outputs

    def record(self, on: bool = True) -> None:
        """Starts, or stops, keeping inputs; the current position counts as committed."""
        self._is_recording = on
        self._set_committed()

    def commit(self, n: int) -> None:
        """Keeps the first `n` positions; recomputes from the last commit if `n` is not the latest.

        Raises:
            UsageError: `n` is before the last commit, or beyond the latest position.
        """
        _check_commit(n, self._committed_length, self._length)
        if n < self._length:
            self.memory = self._committed_memory
            kept_length = n - self._committed_length
            if kept_length and self._step is not None:
                inputs = tuple(cat(pieces, 1)[:, :kept_length] for pieces in zip(*self._inputs, strict=True))
                self.memory, _ = self._step(self._committed_memory, inputs)
        self._length = n
        self._set_committed()

    def get_seq_length(self) -> int:
        """The number of positions that the memory has read."""
        return self._length

    def activate_past_recording(self) -> None:
        """Hugging Face's name for `record`."""
        self.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` positions; Hugging Face's assisted generation calls it."""
        self.commit(self._length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Forgets everything."""
        self.memory, self._length = None, 0
        self._set_committed()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows `beam_idx` of the batch, for beam search."""
        self._map_tensors(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows `indices` of the batch."""
        self._map_tensors(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row of the batch `repeats` times."""
        self._map_tensors(lambda x: x.repeat_interleave(repeats, dim=0))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing: a recurrence has no keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Always raises, because a recurrence has no keys and values.

        Raises:
            UnsupportedModel: always.
        """
        raise UnsupportedModel("an attention was given the state of a recurrence; make states with make_states()")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of positions with those to come, offset 0), from which stock models make masks."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def _set_committed(self) -> None:
        self._committed_memory, self._committed_length = self.memory, self._length
        self._inputs, self._step = [], None  # a step may hold its module, which a copy of this state must not copy

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        def change_all(tensors: Tensors | None) -> Tensors | None:
            return None if tensors is None else tuple(change(x) for x in tensors)

        self.memory, self._committed_memory = change_all(self.memory), change_all(self._committed_memory)
        self._inputs = [tuple(change(x) for x in inputs) for inputs in self._inputs]


def record(cache: Cache | Sequence[State], on: bool = True) -> None:
    """Starts or stops recording in every layer of a cache, potstill's or a stock one; `commit` then rolls back.

    Raises:
        UnsupportedModel: a stock layer cannot roll back, such as that of a recurrence or a static cache.
    """
    for layer in _get_layers(cache):
        if isinstance(layer, State):
            layer.record(on)
        elif isinstance(_check_stock_layer(layer), DynamicSlidingWindowLayer):
            WindowKeyValues.record(layer, on)


def commit(cache: Cache | Sequence[State], n: int) -> None:
    """Keeps the first `n` positions in every layer of a cache, potstill's or a stock one.

    Raises:
        UnsupportedModel: a stock layer cannot roll back.
        UsageError: a layer holds fewer than `n` positions, or cannot go back to `n`.
    """
    for layer in _get_layers(cache):
        if isinstance(layer, State):
            layer.commit(n)
        elif isinstance(_check_stock_layer(layer), DynamicSlidingWindowLayer):
            WindowKeyValues.commit(layer, n)
        else:
            KeyValues.commit(layer, n)


def _get_layers(cache: Any) -> Sequence[Any]:
    layers: Sequence[Any] = getattr(getattr(cache, "self_attention_cache", cache), "layers", cache)
    return layers


def _check_stock_layer(layer: Any) -> Any:
    """The layer itself, if it can roll back."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return layer
    raise UnsupportedModel(
        f"{type(layer).__name__} cannot take back tokens once it has read them; use a model whose cache holds keys and "
        f"values alone, or import it as a potstill model"
    )


def _check_commit(n: int, committed: int, length: int) -> None:
    if not committed <= n <= length:
        is_committed = 0 <= n < committed
        reason = f", {committed} of them committed; call record before the draft" if is_committed else ""
        raise UsageError(f"cannot keep the first {n} positions of a state that holds {length}{reason}")
