"""Packs documents end to end into rows of at most `length` tokens, before training starts.

A longer document is cut into windows, each a document of its own (`data.windows`). Packing is best fit on decreasing
lengths (Johnson et al., 1974: at most 11/9 of the fewest packs, plus four). Documents of one length are shuffled
before, and packs afterwards.

Documents with the same number in the field `groups` stay in one pack, side by side and in their order. A group that
does not fit, or that loses a document to `keep_window`, is dropped whole and counted.

`collate` lays packs end to end as one row. `ops.layout.unpack` turns that into padded rows for a model that would mix
packed documents.
"""

import bisect
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from potstill.core.errors import DataError, UsageError
from potstill.core.screen import status
from potstill.core.types import (
    ALIGNED_GROUPS,
    ALIGNED_PAIRS,
    EDIT_ALIGNED_PAIRS,
    IGNORE,
    get_view,
    supervised_positions,
)
from potstill.data.pack_fields import OFFSETS, ROUTES, TARGETS, collate_fields, join_fields, slice_fields, to_tensor
from potstill.data.shared_prompts import check_offsets, find_pairs
from potstill.data.token_dataset import TokenizedDocument
from potstill.data.windows import DocumentWindow, WindowCounts, count_windows, cut_windows

Pack = dict[str, Tensor]  # input_ids [T], labels [T], lengths [documents], and declared fields [T] or [documents]


@dataclass(frozen=True, eq=False)
class Packs:
    """A map-style data set: `packs[i]` holds `input_ids [T]`, `labels [T]`, `lengths [documents]` and all fields.

    `counts` says what became of the documents. `fields` holds the declared fields of all packs, per token or per
    document.
    """

    input_ids: Int32[np.ndarray, " num_tokens"]  # of all packs, end to end
    labels: Int32[np.ndarray, " num_tokens"]
    lengths: Int32[np.ndarray, " documents"]
    token_offsets: Int64[np.ndarray, " packs_and_one"]
    document_offsets: Int64[np.ndarray, " packs_and_one"]
    length: int
    counts: WindowCounts
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.token_offsets) - 1

    def __getitem__(self, i: int) -> Pack:
        i = range(len(self))[i]
        tokens = slice(*self.token_offsets[i : i + 2])
        documents = slice(*self.document_offsets[i : i + 2])
        parts = {"input_ids": self.input_ids[tokens], "labels": self.labels[tokens], "lengths": self.lengths[documents]}
        parts |= slice_fields(self.fields, tokens, documents)
        return {name: to_tensor(part) for name, part in parts.items()}

    def take(self, num_packs: int) -> "Packs":
        """The first `num_packs` packs, or all if there are fewer.

        Raises: UsageError for no packs.
        """
        if num_packs < 1:
            raise UsageError(f"{num_packs} packs cannot be trained on; take at least one")
        num_packs = min(num_packs, len(self))
        num_tokens, num_documents = int(self.token_offsets[num_packs]), int(self.document_offsets[num_packs])
        return replace(
            self,
            input_ids=self.input_ids[:num_tokens],
            labels=self.labels[:num_tokens],
            lengths=self.lengths[:num_documents],
            token_offsets=self.token_offsets[: num_packs + 1],
            document_offsets=self.document_offsets[: num_packs + 1],
            fields=slice_fields(self.fields, slice(num_tokens), slice(num_documents)),
        )

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all packs."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """The number of tokens that are trained on: those with a target, or else a label."""
        return int((self.fields.get(TARGETS.name, self.labels) != IGNORE).sum())

    @property
    def fill(self) -> float:
        """The share of the packs' capacity that tokens take up."""
        return self.num_tokens / (len(self) * self.length)

    @property
    def digest(self) -> str:
        """The SHA-256 of the tokens, labels, bounds and fields, in order."""
        parts = [array.tobytes() for array in (self.input_ids, self.labels, self.lengths, self.document_offsets)]
        for name in sorted(self.fields, key=lambda name: (name != ROUTES.name, name)):
            parts += [] if name == ROUTES.name else [name.encode()]  # caches and runs know routes without their name
            parts.append(self.fields[name].tobytes())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def join_packs(first: Packs, second: Packs) -> Packs:
    """The packs of `first` and then those of `second`, which hold the same fields; the counts are those of `first`."""

    def join_offsets(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.concatenate([left, left[-1] + right[1:]])

    return replace(
        first,
        input_ids=np.concatenate([first.input_ids, second.input_ids]),
        labels=np.concatenate([first.labels, second.labels]),
        lengths=np.concatenate([first.lengths, second.lengths]),
        token_offsets=join_offsets(first.token_offsets, second.token_offsets),
        document_offsets=join_offsets(first.document_offsets, second.document_offsets),
        length=max(first.length, second.length),
        fields={name: np.concatenate([values, second.fields[name]]) for name, values in first.fields.items()},
    )


@status("packing")
def pack(
    rows: Iterable[TokenizedDocument],
    *,
    length: int,
    seed: int = 0,
    bos: int | None = None,
    keep_window: Callable[[np.ndarray, np.ndarray], bool] | None = None,
) -> Packs:
    """Packs `rows` into packs of at most `length` tokens. With `bos`, each further window of a document begins with it.

    `keep_window(ids, labels)` decides whether a window is kept; it sees a continuation with its prompt. A document in a
    group needs no token to train on, and without one it is kept.

    Raises: UsageError for a length that is too small to hold a token and its context; DataError if no row holds a
    token to train on, or if no group fits.
    """
    if length < (2 if bos is None else 3):
        raise UsageError(f"packs of {length} tokens have no room for a token and what it is predicted from")
    units: dict[int, list[DocumentWindow]] = {}  # the windows that share a pack; by group, or below 0 one by one
    dropped_groups: set[int] = set()
    documents: list[list[DocumentWindow]] = []
    lengths: list[int] = []
    num_dropped = 0
    for row in rows:
        documents.append(cut_windows(row, length=length, bos=bos))
        lengths.append(len(row.input_ids))
        for window in documents[-1]:
            is_kept = keep_window is None or _is_kept(window, units.get(window.group, ()), keep_window)
            if window.group >= 0:
                units.setdefault(window.group, []).append(window)
                dropped_groups |= set() if is_kept else {window.group}
            elif is_kept and window.is_trained:
                units[-1 - len(units)] = [window]
            else:
                num_dropped += 1
    sizes = {key: sum(len(window.input_ids) for window in unit) for key, unit in units.items()}
    dropped_groups |= {key for key, size in sizes.items() if key >= 0 and size > length}
    kept_units = [unit for key, unit in units.items() if key not in dropped_groups]
    if not kept_units and dropped_groups:
        raise DataError(
            f"none of the {len(dropped_groups)} groups of documents fits into a pack of {length} tokens; the smallest "
            f"has {min(sizes.values())}; give a larger --context"
        )
    if not kept_units:
        raise DataError("there is no token to train on in any document; nothing can be packed")
    counts = count_windows(documents, lengths, context=length, dropped=num_dropped, groups=len(dropped_groups))
    return _build_packs(_arrange_units(kept_units, length=length, seed=seed), counts)


def _is_kept(
    window: DocumentWindow, unit: Sequence[DocumentWindow], keep_window: Callable[[np.ndarray, np.ndarray], bool]
) -> bool:
    """Whether to keep a window, which may continue the last document of `unit` that began at 0."""
    if window.group >= 0 and not window.is_trained:
        return True
    size = int(window.fields.get(OFFSETS.name, 0))
    prompts = [item.input_ids for item in unit if not item.fields.get(OFFSETS.name, 0)] if size else []
    prefix = prompts[-1][:size] if prompts else window.input_ids[:0]
    labels = np.concatenate([np.full_like(prefix, IGNORE), window.labels])
    return bool(keep_window(np.concatenate([prefix, window.input_ids]), labels))


def _arrange_units(units: Sequence[Sequence[DocumentWindow]], *, length: int, seed: int) -> list[list[DocumentWindow]]:
    """The windows of each pack, shuffled; the windows of a unit stay side by side."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(units)).tolist()
    bins = best_fit_decreasing([sum(len(window.input_ids) for window in units[i]) for i in order], length)
    return [
        [window for index in bins[bin_index] for window in units[order[index]]]
        for bin_index in generator.permutation(len(bins)).tolist()
    ]


def _build_packs(packs: Sequence[Sequence[DocumentWindow]], counts: WindowCounts) -> Packs:
    windows = [window for pack_windows in packs for window in pack_windows]
    lengths = np.array([len(window.input_ids) for window in windows], dtype=np.int32)
    documents = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    return Packs(
        input_ids=np.concatenate([window.input_ids for window in windows]),
        labels=np.concatenate([window.labels for window in windows]),
        lengths=lengths,
        token_offsets=tokens,
        document_offsets=documents,
        length=counts.context,
        counts=counts,
        fields=join_fields([window.fields for window in windows], lengths.tolist()),
    )


def make_pack(documents: Sequence[TokenizedDocument]) -> Pack:
    """One pack of these documents, in their order, with every field that one of them has."""
    lengths = [len(document.input_ids) for document in documents]
    fields = join_fields([document.fields for document in documents], lengths)
    return {
        "input_ids": torch.tensor([token for document in documents for token in document.input_ids]),
        "labels": torch.tensor([label for document in documents for label in document.labels]),
        "lengths": torch.tensor(lengths),
        **{name: to_tensor(np.asarray(values)) for name, values in fields.items()},
    }


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices whose lengths sum to at most `capacity`.

    Takes the longest first, and puts each into the bin where it leaves the least space.
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        index = bisect.bisect_left(spaces, (lengths[i], -1))
        if index == len(spaces):
            bins.append([])
        space, bin_index = spaces.pop(index) if index < len(spaces) else (capacity, len(bins) - 1)
        bins[bin_index].append(i)
        bisect.insort(spaces, (space - lengths[i], bin_index))
    return bins


def collate(packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Lays packs end to end as one row `[1 T]`: a `Batch` in which positions restart with each document.

    A document begins at position 0, or at its value of the field `offsets`. Packs with `sides` give the key `pairs`
    (`data.shared_prompts`). Declared fields are handed on: per token as `[1 T]`, per document as `[documents]`
    (`data.pack_fields`). The inputs of a teacher with another tokenizer (`data.cross_tokenizer.packs`) are laid out
    alike, and the alignment of tokens becomes one of rows.

    Raises: DataError for a continuation without its prompt, or a group with several documents on one side.
    """
    batch = _flatten_packs(packs)
    if "teacher.input_ids" not in packs[0]:
        return batch
    teacher_batch = _flatten_packs([get_view(item, "teacher") for item in packs])
    sizes = torch.tensor([[len(item["input_ids"]), len(item["teacher.input_ids"])] for item in packs])
    starts = sizes.cumsum(0) - sizes
    rows = [_number_rows(item) for item in (batch, teacher_batch)]
    pairs = {
        ALIGNED_PAIRS: ("aligned.tokens", 1),
        EDIT_ALIGNED_PAIRS: (EDIT_ALIGNED_PAIRS, 0),
    }  # the token that a row predicts; the token at the row's position
    for name, (key, shift) in pairs.items():
        if key in packs[0]:
            tokens = torch.cat([item[key] + start for item, start in zip(packs, starts, strict=True)])
            batch[name] = _map_tokens_to_rows(tokens - shift, *rows)
    group_offsets = (
        torch.tensor([0, *(int(item[ALIGNED_GROUPS[0]].max()) + 1 for item in packs[:-1])]).clamp(min=0).cumsum(0)
    )
    for name, side in zip(ALIGNED_GROUPS, (batch, teacher_batch), strict=True):
        groups = torch.cat(
            [
                torch.where(item[name] >= 0, item[name] + offset, -1)
                for item, offset in zip(packs, group_offsets, strict=True)
            ]
        )
        batch[name] = groups[1:][supervised_positions(side)[0][0, :-1]]
    return batch | {f"teacher.{key}": tensor for key, tensor in teacher_batch.items()}


def _flatten_packs(packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    for item in packs:
        check_offsets(item)
    lengths = [torch.as_tensor(item["lengths"]) for item in packs]
    document_lengths = torch.cat(lengths)
    documents = torch.repeat_interleave(torch.arange(len(document_lengths)), document_lengths)
    fields = collate_fields(packs, documents, lengths)
    starts = document_lengths.cumsum(0) - document_lengths - fields.get(OFFSETS.name, torch.tensor(0))
    return {
        "input_ids": torch.cat([torch.as_tensor(item["input_ids"]) for item in packs])[None],
        "labels": torch.cat([torch.as_tensor(item["labels"]) for item in packs])[None],
        "position_ids": (torch.arange(len(documents)) - starts[documents])[None],
        "documents": documents[None],
        **fields,
        **find_pairs(fields),
    }


def _number_rows(batch: Mapping[str, Tensor]) -> Int64[Tensor, " T"]:
    """The number of the row at each token `[T]`; -1 at a token whose successor is not trained on."""
    positions = supervised_positions(batch)[0][0]
    return torch.where(positions, positions.cumsum(0) - 1, -1)


def _map_tokens_to_rows(
    tokens: Int64[Tensor, "P 2"], student_rows: Int64[Tensor, " T"], teacher_rows: Int64[Tensor, " M"]
) -> Int64[Tensor, "2 Q"]:
    """The rows `[2 Q]` at the tokens of each pair, of the pairs where both tokens have a row."""
    tokens = tokens[(tokens >= 0).all(1)]
    row_pairs = torch.stack([student_rows[tokens[:, 0]], teacher_rows[tokens[:, 1]]])
    return row_pairs[:, (row_pairs >= 0).all(0)]
