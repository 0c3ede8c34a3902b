"""Documents packed end to end into rows of at most `length` tokens, made beforehand.

A document that is longer is cut into windows, each a document of its own. A window begins with the last token of the
one before it, which is its context, so that every label is trained on exactly once. Packing is best fit on decreasing
lengths (Johnson et al., 1974: at most 11/9 of the fewest packs, plus four); documents of one length are shuffled
before, packs afterwards. `collate` lays packs end to end as one row; `ops.layout.unpack` makes padded rows of that
where a model mixes what is packed.
"""

import bisect
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from potstill.core.errors import DataError, UsageError
from potstill.core.types import (
    ALIGNED_GROUPS,
    ALIGNED_PAIRS,
    EDIT_ALIGNED_PAIRS,
    IGNORE,
    get_view,
    supervised_positions,
)
from potstill.data.token_dataset import TokenizedDocument

Pack = dict[str, Tensor]  # input_ids [T], labels [T], lengths [documents], routes [documents] if there are any
DocumentWindow = tuple[
    Int32[np.ndarray, " _"], Int32[np.ndarray, " _"]
]  # ids and labels of a document or a window of one


@dataclass(frozen=True, eq=False)
class Packs:
    """A map-style data set: `packs[i]` holds `input_ids [T]`, `labels [T]` and the `lengths` of its documents.

    `cut` counts the documents that were longer than a pack, `dropped` the windows of them without a token to train on.
    Where a route was asked for, each document has one in `routes`.
    """

    input_ids: Int32[np.ndarray, " num_tokens"]  # of all packs, end to end
    labels: Int32[np.ndarray, " num_tokens"]
    lengths: Int32[np.ndarray, " documents"]
    token_offsets: Int64[np.ndarray, " packs_and_one"]
    document_offsets: Int64[np.ndarray, " packs_and_one"]
    length: int
    num_cut: int
    num_dropped: int
    routes: Int32[np.ndarray, " documents"] | None = None

    def __len__(self) -> int:
        return len(self.token_offsets) - 1

    def __getitem__(self, i: int) -> Pack:
        i = range(len(self))[i]
        tokens = slice(*self.token_offsets[i : i + 2])
        documents = slice(*self.document_offsets[i : i + 2])
        parts = {"input_ids": self.input_ids[tokens], "labels": self.labels[tokens], "lengths": self.lengths[documents]}
        parts |= {} if self.routes is None else {"routes": self.routes[documents]}
        return {name: torch.from_numpy(part.astype(np.int64)) for name, part in parts.items()}

    def take(self, num_packs: int) -> "Packs":
        """The first so many packs."""
        if num_packs < 1:
            raise UsageError(f"{num_packs} packs cannot be trained on; take at least one")
        num_packs = min(num_packs, len(self))
        num_tokens, num_documents = int(self.token_offsets[num_packs]), int(self.document_offsets[num_packs])
        return Packs(
            self.input_ids[:num_tokens],
            self.labels[:num_tokens],
            self.lengths[:num_documents],
            self.token_offsets[: num_packs + 1],
            self.document_offsets[: num_packs + 1],
            self.length,
            self.num_cut,
            self.num_dropped,
            None if self.routes is None else self.routes[:num_documents],
        )

    @property
    def num_tokens(self) -> int:
        """All tokens, in all packs."""
        return len(self.input_ids)

    @property
    def num_trained(self) -> int:
        """The tokens that are trained on."""
        return int((self.labels != IGNORE).sum())

    @property
    def fill(self) -> float:
        """The share of the packs' room that tokens take up."""
        return self.num_tokens / (len(self) * self.length)

    @property
    def digest(self) -> str:
        """The SHA-256 of the tokens, labels, bounds and routes, in order."""
        parts = [self.input_ids, self.labels, self.lengths, self.document_offsets]
        parts += [] if self.routes is None else [self.routes]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def pack(
    rows: Iterable[TokenizedDocument],
    *,
    length: int,
    seed: int = 0,
    bos: int | None = None,
    keep_window: Callable[[np.ndarray, np.ndarray], bool] | None = None,
) -> Packs:
    """`rows` in packs of at most `length` tokens. With `bos`, each further window of a long document begins with it.

    `only` says of the ids and labels of a window whether it is taken.

    Raises: UsageError for a length that leaves no room; DataError if no row holds a token to train on.
    """
    if length < (2 if bos is None else 3):
        raise UsageError(f"packs of {length} tokens have no room for a token and what it is predicted from")
    pieces: list[DocumentWindow] = []
    routes: list[int] = []
    num_cut = num_dropped = 0
    for row in rows:
        parts = cut_windows(row, length=length, bos=bos)
        trained_windows = [
            part for part in parts if (part[1] != IGNORE).any() and (keep_window is None or keep_window(*part))
        ]
        num_cut, num_dropped = num_cut + (len(parts) > 1), num_dropped + len(parts) - len(trained_windows)
        pieces += trained_windows
        routes += [] if row.route is None else [row.route] * len(trained_windows)
    if not pieces:
        raise DataError("there is no token to train on in any document; nothing can be packed")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pieces)).tolist()
    bins = best_fit_decreasing([len(pieces[i][0]) for i in order], length)
    pack_members = [
        [order[index] for index in bins[bin_index]] for bin_index in generator.permutation(len(bins)).tolist()
    ]
    return _build_packs(pieces, routes, pack_members, length=length, num_cut=num_cut, num_dropped=num_dropped)


def _build_packs(
    pieces: Sequence[DocumentWindow],
    routes: Sequence[int],
    packs: Sequence[Sequence[int]],
    *,
    length: int,
    num_cut: int,
    num_dropped: int,
) -> Packs:
    order = [i for members in packs for i in members]
    lengths = np.array([len(pieces[i][0]) for i in order], dtype=np.int32)
    documents = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    ids, labels = (np.concatenate([pieces[i][part] for i in order]) for part in (0, 1))
    route_array = np.array([routes[i] for i in order], dtype=np.int32) if routes else None
    return Packs(ids, labels, lengths, tokens, documents, length, num_cut, num_dropped, route_array)


def cut_windows(row: TokenizedDocument, *, length: int, bos: int | None = None) -> list[DocumentWindow]:
    """A document's tokens and labels, cut into windows of at most `length` tokens; no label is lost or repeated."""
    ids, labels = np.array(row.input_ids, dtype=np.int32), np.array(row.labels, dtype=np.int32)
    labels[:1] = IGNORE
    parts = [(ids[:length], labels[:length])]
    bos_ids = np.array([] if bos is None else [bos], dtype=np.int32)
    context_labels = np.full(len(bos_ids) + 1, IGNORE, dtype=np.int32)
    for start in range(length, len(ids), length - len(context_labels)):
        stop = start + length - len(context_labels)
        window = np.concatenate([bos_ids, ids[start - 1 : stop]])
        parts.append((window, np.concatenate([context_labels, labels[start:stop]])))
    return parts


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of numbers whose lengths sum to at most `room`: each, the longest first, where it leaves the least room."""
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (room left, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        index = bisect.bisect_left(spaces, (lengths[i], -1))
        if index == len(spaces):
            bins.append([])
        space, bin_index = spaces.pop(index) if index < len(spaces) else (capacity, len(bins) - 1)
        bins[bin_index].append(i)
        bisect.insort(spaces, (space - lengths[i], bin_index))
    return bins


def collate(packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Packs laid end to end as one row `[1 T]`, as a `Batch`: positions restart and numbers grow with each document.

    What a teacher of another tokenizer reads (`data.pairs`) is laid out alike, and what is known of tokens that belong
    together becomes what is known of rows.
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
    }  # of what a row predicts, of what it is read at
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
    lengths = torch.cat([torch.as_tensor(item["lengths"]) for item in packs])
    documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    starts = (lengths.cumsum(0) - lengths)[documents]
    routes = [torch.as_tensor(item["routes"]) for item in packs if "routes" in item]
    route_field = {"routes": torch.cat(routes)[documents][None]} if routes else {}
    return {
        "input_ids": torch.cat([torch.as_tensor(item["input_ids"]) for item in packs])[None],
        "labels": torch.cat([torch.as_tensor(item["labels"]) for item in packs])[None],
        "position_ids": (torch.arange(len(documents)) - starts)[None],
        "documents": documents[None],
        **route_field,
    }


def _number_rows(batch: Mapping[str, Tensor]) -> Int64[Tensor, " T"]:
    """The number of the row at each token, -1 where none is asked for."""
    positions = supervised_positions(batch)[0][0]
    return torch.where(positions, positions.cumsum(0) - 1, -1)


def _map_tokens_to_rows(
    tokens: Int64[Tensor, "P 2"], student_rows: Int64[Tensor, " T"], teacher_rows: Int64[Tensor, " M"]
) -> Int64[Tensor, "2 Q"]:
    """The rows at both tokens of a pair, of the pairs that both sides have a row at."""
    tokens = tokens[(tokens >= 0).all(1)]
    row_pairs = torch.stack([student_rows[tokens[:, 0]], teacher_rows[tokens[:, 1]]])
    return row_pairs[:, (row_pairs >= 0).all(0)]
