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
from potstill.core.types import GROUPS, IGNORE, PAIRS, WARPED, supervised, view
from potstill.data.tokens import Tokenised

Pack = dict[str, Tensor]  # input_ids [T], labels [T], lengths [documents], routes [documents] if there are any
Piece = tuple[Int32[np.ndarray, " _"], Int32[np.ndarray, " _"]]  # ids and labels of a document or a window of one


@dataclass(frozen=True, eq=False)
class Packs:
    """A map-style data set: `packs[i]` holds `input_ids [T]`, `labels [T]` and the `lengths` of its documents.

    `cut` counts the documents that were longer than a pack, `dropped` the windows of them without a token to train on.
    Where a route was asked for, each document has one in `routes`.
    """

    input_ids: Int32[np.ndarray, " tokens"]  # of all packs, end to end
    labels: Int32[np.ndarray, " tokens"]
    lengths: Int32[np.ndarray, " documents"]
    tokens_before: Int64[np.ndarray, " packs_and_one"]
    documents_before: Int64[np.ndarray, " packs_and_one"]
    length: int
    cut: int
    dropped: int
    routes: Int32[np.ndarray, " documents"] | None = None

    def __len__(self) -> int:
        return len(self.tokens_before) - 1

    def __getitem__(self, i: int) -> Pack:
        i = range(len(self))[i]
        tokens = slice(*self.tokens_before[i : i + 2])
        documents = slice(*self.documents_before[i : i + 2])
        parts = {"input_ids": self.input_ids[tokens], "labels": self.labels[tokens], "lengths": self.lengths[documents]}
        parts |= {} if self.routes is None else {"routes": self.routes[documents]}
        return {name: torch.from_numpy(part.astype(np.int64)) for name, part in parts.items()}

    def head(self, packs: int) -> "Packs":
        """The first so many packs."""
        if packs < 1:
            raise UsageError(f"{packs} packs cannot be trained on; take at least one")
        packs = min(packs, len(self))
        tokens, documents = int(self.tokens_before[packs]), int(self.documents_before[packs])
        return Packs(
            self.input_ids[:tokens],
            self.labels[:tokens],
            self.lengths[:documents],
            self.tokens_before[: packs + 1],
            self.documents_before[: packs + 1],
            self.length,
            self.cut,
            self.dropped,
            None if self.routes is None else self.routes[:documents],
        )

    @property
    def tokens(self) -> int:
        """All tokens, in all packs."""
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """The tokens that are trained on."""
        return int((self.labels != IGNORE).sum())

    @property
    def fill(self) -> float:
        """The share of the packs' room that tokens take up."""
        return self.tokens / (len(self) * self.length)

    @property
    def digest(self) -> str:
        """The SHA-256 of the tokens, labels, bounds and routes, in order."""
        parts = [self.input_ids, self.labels, self.lengths, self.documents_before]
        parts += [] if self.routes is None else [self.routes]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def pack(
    rows: Iterable[Tokenised],
    *,
    length: int,
    seed: int = 0,
    bos: int | None = None,
    only: Callable[[np.ndarray, np.ndarray], bool] | None = None,
) -> Packs:
    """`rows` in packs of at most `length` tokens. With `bos`, each further window of a long document begins with it.

    `only` says of the ids and labels of a window whether it is taken.

    Raises: UsageError for a length that leaves no room; DataError if no row holds a token to train on.
    """
    if length < (2 if bos is None else 3):
        raise UsageError(f"packs of {length} tokens have no room for a token and what it is predicted from")
    pieces: list[Piece] = []
    routes: list[int] = []
    cut = dropped = 0
    for row in rows:
        parts = windows(row, length=length, bos=bos)
        kept = [part for part in parts if (part[1] != IGNORE).any() and (only is None or only(*part))]
        cut, dropped = cut + (len(parts) > 1), dropped + len(parts) - len(kept)
        pieces += kept
        routes += [] if row.route is None else [row.route] * len(kept)
    if not pieces:
        raise DataError("there is no token to train on in any document; nothing can be packed")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(pieces)).tolist()
    bins = best_fit([len(pieces[i][0]) for i in order], length)
    chosen = [[order[place] for place in bins[b]] for b in generator.permutation(len(bins)).tolist()]
    return _laid(pieces, routes, chosen, length=length, cut=cut, dropped=dropped)


def _laid(
    pieces: Sequence[Piece],
    routes: Sequence[int],
    packs: Sequence[Sequence[int]],
    *,
    length: int,
    cut: int,
    dropped: int,
) -> Packs:
    flat = [i for members in packs for i in members]
    lengths = np.array([len(pieces[i][0]) for i in flat], dtype=np.int32)
    documents = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    tokens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    ids, labels = (np.concatenate([pieces[i][part] for i in flat]) for part in (0, 1))
    routed = np.array([routes[i] for i in flat], dtype=np.int32) if routes else None
    return Packs(ids, labels, lengths, tokens, documents, length, cut, dropped, routed)


def windows(row: Tokenised, *, length: int, bos: int | None = None) -> list[Piece]:
    """A document's tokens and labels, cut into windows of at most `length` tokens; no label is lost or repeated."""
    ids, labels = np.array(row.input_ids, dtype=np.int32), np.array(row.labels, dtype=np.int32)
    labels[:1] = IGNORE
    parts = [(ids[:length], labels[:length])]
    opening = np.array([] if bos is None else [bos], dtype=np.int32)
    unseen = np.full(len(opening) + 1, IGNORE, dtype=np.int32)
    for start in range(length, len(ids), length - len(unseen)):
        stop = start + length - len(unseen)
        window = np.concatenate([opening, ids[start - 1 : stop]])
        parts.append((window, np.concatenate([unseen, labels[start:stop]])))
    return parts


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Bins of numbers whose lengths sum to at most `room`: each, the longest first, where it leaves the least room."""
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room left, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(left, (lengths[i], -1))
        if place == len(left):
            bins.append([])
        free, chosen = left.pop(place) if place < len(left) else (room, len(bins) - 1)
        bins[chosen].append(i)
        bisect.insort(left, (free - lengths[i], chosen))
    return bins


def collate(packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Packs laid end to end as one row `[1 T]`, as a `Batch`: positions restart and numbers grow with each document.

    What a teacher of another tokenizer reads (`data.pairs`) is laid out alike, and what is known of tokens that belong
    together becomes what is known of rows.
    """
    batch = _laid_out(packs)
    if "teacher.input_ids" not in packs[0]:
        return batch
    own = _laid_out([view(one, "teacher") for one in packs])
    sizes = torch.tensor([[len(one["input_ids"]), len(one["teacher.input_ids"])] for one in packs])
    starts = sizes.cumsum(0) - sizes
    rows = [_rows_of(one) for one in (batch, own)]
    pairs = {PAIRS: ("aligned.tokens", 1), WARPED: (WARPED, 0)}  # of what a row predicts, of what it is read at
    for name, (key, ahead) in pairs.items():
        if key in packs[0]:
            tokens = torch.cat([one[key] + start for one, start in zip(packs, starts, strict=True)])
            batch[name] = _as_rows(tokens - ahead, *rows)
    before = torch.tensor([0, *(int(one[GROUPS[0]].max()) + 1 for one in packs[:-1])]).clamp(min=0).cumsum(0)
    for name, side in zip(GROUPS, (batch, own), strict=True):
        groups = torch.cat(
            [torch.where(one[name] >= 0, one[name] + n, -1) for one, n in zip(packs, before, strict=True)]
        )
        batch[name] = groups[1:][supervised(side)[0][0, :-1]]
    return batch | {f"teacher.{key}": tensor for key, tensor in own.items()}


def _laid_out(packs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    lengths = torch.cat([torch.as_tensor(one["lengths"]) for one in packs])
    documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    starts = (lengths.cumsum(0) - lengths)[documents]
    routes = [torch.as_tensor(one["routes"]) for one in packs if "routes" in one]
    routed = {"routes": torch.cat(routes)[documents][None]} if routes else {}
    return {
        "input_ids": torch.cat([torch.as_tensor(one["input_ids"]) for one in packs])[None],
        "labels": torch.cat([torch.as_tensor(one["labels"]) for one in packs])[None],
        "position_ids": (torch.arange(len(documents)) - starts)[None],
        "documents": documents[None],
        **routed,
    }


def _rows_of(batch: Mapping[str, Tensor]) -> Int64[Tensor, " T"]:
    """The number of the row at each token, -1 where none is asked for."""
    positions = supervised(batch)[0][0]
    return torch.where(positions, positions.cumsum(0) - 1, -1)


def _as_rows(
    tokens: Int64[Tensor, "P 2"], ours: Int64[Tensor, " T"], theirs: Int64[Tensor, " M"]
) -> Int64[Tensor, "2 Q"]:
    """The rows at both tokens of a pair, of the pairs that both sides have a row at."""
    tokens = tokens[(tokens >= 0).all(1)]
    found = torch.stack([ours[tokens[:, 0]], theirs[tokens[:, 1]]])
    return found[:, (found >= 0).all(0)]
