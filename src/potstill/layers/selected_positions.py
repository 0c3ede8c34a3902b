"""The positions of some tokens of a pass, for a layer that the other tokens skip."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from potstill.core.blueprint import Rotary
from potstill.core.depth_state import ExecutedTokens
from potstill.layers.positions import CosSin, Positions
from potstill.ops.attention import Prefix, Prefixes, is_within_window


class SelectedPositions(Positions):
    """The tokens at `indices` (b T + t, ascending) of `source`, packed into one row; to them no other token exists.

    They keep their own positions, so rotations and windows are those of the whole text. Without a past they are packed
    documents: what is left of each document of each row. A continuation sees what is left of its prompt. After the
    tokens of `past` they are one document. With `None` for indices they are all tokens of one row.
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
        documents = source._get_starts().flatten().cumsum(0)
        self._documents = documents if indices is None else documents[indices]
        self.key_ids = ids
        self.lengths = (tuple(self._documents.unique_consecutive(return_counts=True)[1].tolist()),)
        self.prefixes = None if source.prefixes is None else self._find_prefixes(source.prefixes)

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

    def _find_prefixes(self, source_prefixes: Prefixes) -> Prefixes:
        """The selected tokens of the prompt of each document."""
        prefixes = [
            Prefix(1 + first_document + prefix.document, prefix.size)  # documents count from 1 through all rows
            for first_document, row in zip(_count_before(source_prefixes), source_prefixes, strict=True)
            for prefix in row
        ]
        documents = self._documents.cpu()
        numbers = documents.unique_consecutive().tolist()
        tokens = torch.arange(self._source.ids.numel()) if self._indices is None else self._indices.cpu()
        starts = self._source._get_starts().flatten().nonzero()[:, 0].tolist()
        places = {number: place for place, number in enumerate(numbers)}
        selected_prefixes = []
        for prefix in (prefixes[number - 1] for number in numbers):
            start = starts[prefix.document - 1]
            is_in_prefix = (tokens >= start) & (tokens < start + prefix.size)
            selected_prefixes.append(Prefix(places.get(prefix.document, 0), int(is_in_prefix.sum())))
        return (tuple(selected_prefixes),)

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


def _count_before(rows: Sequence[Sequence[object]]) -> list[int]:
    """The number of items in the rows before each row."""
    return [0, *accumulate(len(row) for row in rows)][:-1]
