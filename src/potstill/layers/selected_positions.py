"""The positions of some tokens of a pass, for a layer that the other tokens skip."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from potstill.core.blueprint import Rotary
from potstill.core.depth_state import ExecutedTokens
from potstill.layers.positions import CosSin, Positions
from potstill.ops.attention import is_within_window


class SelectedPositions(Positions):
    """The tokens at `indices` (b T + t, ascending) of `source`, packed into one row; to them no other token exists.

    They keep their own positions, so rotations and windows are those of the whole text. Without a past they are packed
    documents: what is left of each document of each row. After the tokens of `past` they are one document. With `None`
    for indices they are all tokens of one row.
    """

    def __init__(
        self, source: Positions, indices: Int[Tensor, " N"] | None, past: ExecutedTokens | None = None
    ) -> None:
        ids = source.ids if indices is None else source.ids.flatten()[indices][None]
        super().__init__(ids, source.rotary, source.context)
        self._source, self._indices, self._past = source, indices, past
        if past is not None and past.slots:
            self.past_length = len(past.slots)
            return
        documents = source.starts.flatten().cumsum(0)
        self._documents = documents if indices is None else documents[indices]
        self.key_ids = ids
        self.lengths = (tuple(self._documents.unique_consecutive(return_counts=True)[1].tolist()),)

    def report(self, name: str, value: Tensor) -> None:
        """Reports `value [1 N ...]` as `[B T ...]`, with zeros at all other tokens."""
        if self._indices is not None:
            shape = self._source.ids.shape
            zeros = value.new_zeros(shape.numel(), *value.shape[2:])
            value = zeros.index_copy(0, self._indices, value[0]).unflatten(0, shape)
        self._source.report(name, value)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as in `Positions`
    def get_cos_sin(self, head_dim: int, dtype: torch.dtype, rotary: Rotary | None = None) -> CosSin:
        """Cosines and sines `[1 1 N K]` of the tokens' angles, which `source` computes once for all layers."""
        cos, sin = self._source.get_cos_sin(head_dim, dtype, rotary)
        if self._indices is None:
            return cos, sin
        return cos[:, 0].flatten(0, 1)[self._indices][None, None], sin[:, 0].flatten(0, 1)[self._indices][None, None]

    def _find_starts(self) -> Bool[Tensor, "1 N"]:
        starts = torch.full_like(self.ids, not self.past_length, dtype=torch.bool)
        if not self.past_length:
            starts[0, 1:] = self._documents[1:] != self._documents[:-1]
        return starts

    def _build_mask(self, keys: int, window: int | None) -> Tensor | None:
        mask = super()._build_mask(keys, None)
        if window is None:
            return mask
        key_ids = self.ids
        if self._past is not None and self.past_length:
            key_ids = torch.cat([self._past.get_positions()[None], key_ids], 1)
        is_near = is_within_window(self.ids, key_ids[:, -keys:], window)  # a state may hold the last keys alone
        return is_near if mask is None else mask & is_near
