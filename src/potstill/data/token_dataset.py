"""Tokenised documents, as many as fit in memory at eight bytes a token."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Int32

from potstill.core.types import IGNORE


class TokenizedDocument(NamedTuple):
    """A document as tokens; `labels` are `input_ids` where a token is trained on, else IGNORE; never the first one.

    `route` is the number of who is to teach it, where that was asked for.
    """

    input_ids: list[int]
    labels: list[int]
    route: int | None = None


class TokenDataset(Sequence[TokenizedDocument]):
    """The tokenised documents of a corpus: a sequence of `Tokenised`, held as flat arrays of 32-bit integers.

    `documents[i]` is the number in the corpus of the i-th row; `dropped` counts what was left out, by reason.
    `routes[i]` is the i-th row's; None where no route was asked for.
    """

    def __init__(self, rows: Iterable[tuple[int, TokenizedDocument]], dropped: Mapping[str, int]) -> None:
        ids: list[Int32[np.ndarray, " T"]] = []
        labels: list[Int32[np.ndarray, " T"]] = []
        documents: list[int] = []
        routes: list[int] = []
        for number, row in rows:
            ids.append(np.array(row.input_ids, dtype=np.int32))
            labels.append(np.array(row.labels, dtype=np.int32))
            documents.append(number)
            routes += [] if row.route is None else [row.route]
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int32)
        self.ends = np.cumsum([len(document_ids) for document_ids in ids], dtype=np.int64)
        self.documents = np.array(documents, dtype=np.int64)
        self.routes = np.array(routes, dtype=np.int64) if routes else None
        self.dropped = dict(dropped)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> TokenizedDocument: ...
    @overload
    def __getitem__(self, i: slice) -> list[TokenizedDocument]: ...
    def __getitem__(self, i: int | slice) -> TokenizedDocument | list[TokenizedDocument]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        start, stop = int(self.ends[i - 1]) if i else 0, int(self.ends[i])
        route = None if self.routes is None else int(self.routes[i])
        return TokenizedDocument(self.ids[start:stop].tolist(), self.labels[start:stop].tolist(), route)

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """The tokens that are trained on."""
        return int((self.labels != IGNORE).sum())
