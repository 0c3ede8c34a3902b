"""Corpora by name: a file, a folder, a data set of the Hugging Face hub, or `stdlib`.

A name that is there as a file or folder is that; `owner/name` or `owner/name:config` else is a hub data set, streamed;
`stdlib` is always the docstrings of Python's library. What is held out for validation is what the source itself holds
out (files or splits named train and validation, or test), else a twentieth by hash: see `split.py`.
"""

import hashlib
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from potstill.core.errors import DataError, NotFound, UsageError
from potstill.data import hub, sources, stdlib
from potstill.data.rows import Reader, Route
from potstill.data.shapes import Document, Kind
from potstill.data.sources import Record
from potstill.data.split import FEW, SHARE, below, fingerprint, hidden, runs

Split = Literal["train", "validation", "all"]
Thing = TypeVar("Thing")
CHUNK = 4096  # documents that are Python objects at once; the rest is Arrow
AHEAD = 256  # rows of a stream that are read to see what it is

FEATURES: Mapping[Kind, Features] = {
    "text": Features({"text": Value("large_string"), "whole": Value("bool")}),
    "pairs": Features({"prompt": Value("large_string"), "response": Value("large_string")}),
    "chat": Features({"messages": List({"role": Value("string"), "content": Value("large_string")})}),
}


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind, and where they come from.

    Columns of `documents`: `text` and `whole` (False where a longer text goes on behind a section, so that no end of
    text belongs there) | `prompt`, `response` | `messages`, a list of `{role, content}` with the roles system, user
    and assistant. They lie in the order of their hashes, those of a stream in their own, so that what reads only the
    first ones reads a fair sample. `digest` is the SHA-256 over all of them, None for a stream. `dropped` counts the
    rows of the source that were left out, by reason. Where a route was asked for, `route` is a column too: a number,
    that is no part of what a document says.
    """

    name: str
    kind: Kind
    documents: Dataset | IterableDataset
    digest: str | None
    licence: str | None
    provenance: Mapping[str, Any]
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many documents there are.

        Raises: TypeError for a stream, which does not know.
        """
        return len(self.documents)


def said(document: Mapping[str, Any]) -> str:
    """The text of a document; of a pair or a chat its turns, a line break between them."""
    if "messages" in document:
        return "\n".join(turn["content"] for turn in document["messages"])
    return document["text"] if "text" in document else f"{document['prompt']}\n{document['response']}"


def load_corpus(
    name: str | os.PathLike[str],
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    route: Route | None = None,
) -> Corpus:
    """The corpus of that name, or at that path.

    `split` is `train`, `validation` or `all`. `limit` keeps the first so many documents. `columns` says which column
    is which where their names do not: `{"text": ...}`, `{"prompt": ..., "response": ...}` or `{"messages": ...}`.
    `route` adds to each document whose it is.

    Raises: NotFound, UsageError for a wrong option, DataError for a data set that is broken, empty or of another shape.
    """
    side = _side(split)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; at least one document is needed")
    name = os.fspath(name)
    path = Path(name).expanduser()
    if name == "stdlib":
        if route is not None:
            raise UsageError(f"stdlib has no column {route.column!r} to route by; give --data that has")
        return _stdlib(side, limit)
    if path.exists():
        return _local(name, path, side, limit, Reader(columns, route))
    if hub.ID.fullmatch(name) and not sources.format_of(path):
        return _from_hub(name, side, limit, Reader(columns, route))
    raise NotFound(f"there is no file or folder {name}; a data set of the hub is called owner/name")


def _side(split: str) -> Split:
    for side in get_args(Split):
        if side == split:
            return cast(Split, side)
    raise UsageError(f"split is {split!r}; it can be {', '.join(get_args(Split))}")


def _stdlib(split: Split, limit: int | None) -> Corpus:
    documents = _stored({"text": text, "whole": True} for text in stdlib.docstrings())
    provenance = {"source": "stdlib", "python": platform.python_version()}
    return _share(Corpus("stdlib", "text", documents, None, stdlib.LICENCE, provenance), split, limit)


def _local(name: str, path: Path, split: Split, limit: int | None, reader: Reader) -> Corpus:
    files = sources.files_of(path)
    sides = sources.held_out([str(file.relative_to(path)) for file in files]) if path.is_dir() else None
    files, left = _chosen(files, sides, split)
    read = (reader.documents(sources.records(file), source=_spoken(file)) for file in files)
    documents = _stored(chain.from_iterable(read))
    provenance = {"source": name, "files": len(files)}
    corpus = Corpus(name, "text", documents, None, sources.licence_beside(path), provenance)
    return _share(_told(corpus, reader, named=left != split), left, limit)


def _from_hub(name: str, split: Split, limit: int | None, reader: Reader) -> Corpus:
    source = hub.Source(name)
    names = source.splits()
    chosen, left = _chosen(names, sources.held_out(names), split)
    provenance = {"source": f"hub: {name}", "revision": source.revision, "splits": chosen}
    corpus = Corpus(name, "text", Dataset.from_dict({}), None, source.licence, provenance)
    parts = [source.rows(part) for part in chosen]
    if source.offline:
        read = (reader.documents(numbered(part, name), source=name) for part in parts)
        corpus = replace(corpus, documents=_stored(chain.from_iterable(read)))
        return _share(_told(corpus, reader, named=left != split), left, limit)
    with hub.reached(name):
        return streamed(corpus, concatenate_datasets(parts), reader, left, limit)


def numbered(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    """Rows with the place that an error names."""
    return (Record(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1))


def streamed(corpus: Corpus, rows: IterableDataset, reader: Reader, split: Split, limit: int | None) -> Corpus:
    """`corpus` with the share `split` of a stream of `rows`, by hash, read as they are asked for.

    What is dropped is counted while it is read, so `dropped` fills as the stream goes by.
    """
    ahead = list(islice(rows, AHEAD))
    first = next(reader.documents(numbered(ahead, corpus.name), source=corpus.name), None)
    if first is None:
        raise DataError(_nothing(corpus.name, reader.dropped))
    kind, features = kind_of(first), features_of(first)
    reader.dropped.clear()

    def documents(table: Mapping[str, list[Any]], places: list[int]) -> dict[str, list[Any]]:
        batch = (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True))
        located = (Record(row, f"{corpus.name}, row {n + 1}") for row, n in zip(batch, places, strict=True))
        read = reader.documents(located, source=corpus.name)
        kept = [one for one in read if split == "all" or below(fingerprint(one)) == (split == "validation")]
        return {column: [one[column] for one in kept] for column in features}

    stream = rows.map(documents, batched=True, with_indices=True, remove_columns=list(ahead[0]), features=features)
    stream = stream if limit is None else stream.take(limit)
    share = split if split == "all" else f"{split}, {SHARE:.0%} held out by hash"
    provenance = {"split": share, **corpus.provenance, "unread_columns": sorted(reader.unread)}
    return replace(corpus, kind=kind, documents=stream, provenance=provenance, dropped=reader.dropped)


def _spoken(file: Path) -> str:
    """What an error about the columns of a file is about: of a CSV file its first line."""
    return f"the header of {file}" if sources.format_of(file) in (".csv", ".tsv") else str(file)


def _chosen(things: list[Thing], sides: tuple[list[int], list[int]] | None, split: Split) -> tuple[list[Thing], Split]:
    """The files or splits to read, and the share of their documents that then has to be taken by hash."""
    if sides is None or split == "all":
        return things, split
    train, validation = sides
    if not validation:
        return [things[i] for i in train], split
    return [things[i] for i in (train if split == "train" else validation)], "all"


def _told(corpus: Corpus, reader: Reader, *, named: bool) -> Corpus:
    """`corpus` with what its reader found out."""
    if not len(corpus):
        raise DataError(_nothing(corpus.name, reader.dropped))
    provenance = {**corpus.provenance, "unread_columns": sorted(reader.unread)}
    provenance |= {"split": "as its files or splits are named"} if named else {}
    return replace(corpus, provenance=provenance, dropped=dict(reader.dropped))


def _nothing(name: str, dropped: Mapping[str, int]) -> str:
    if not dropped:
        return f"{name} is empty: it holds no document"
    reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.items())
    return f"{name} holds nothing to train on: {reasons}"


def kind_of(document: Mapping[str, Any]) -> Kind:
    """The kind of a document, by its columns."""
    return "chat" if "messages" in document else "pairs" if "prompt" in document else "text"


def features_of(document: Mapping[str, Any]) -> Features:
    """The columns of a corpus of documents like this one."""
    routed = {"route": Value("int64")} if "route" in document else {}
    return Features({**FEATURES[kind_of(document)], **routed})


def _stored(documents: Iterable[Document]) -> Dataset:
    """The documents in Arrow's memory, a chunk at a time."""
    documents, chunks = iter(documents), []
    while chunk := list(islice(documents, CHUNK)):
        chunks.append(Dataset.from_list(chunk, features=features_of(chunk[0])))
    return concatenate_datasets(chunks) if chunks else Dataset.from_dict({})


def _share(corpus: Corpus, split: Split, limit: int | None) -> Corpus:
    """The share `split` of a corpus, in the order of its documents' hashes: the first ones are a fair sample."""
    documents, kind = corpus.documents, kind_of(corpus.documents.features)
    said, cut = str(split), split != "all" and kind == "text" and len(documents) < FEW
    if cut:
        if "route" in documents.features:
            raise DataError(
                f"{corpus.name} holds {len(documents)} texts, which are cut into sections, and no column says whose a "
                f"section is; give {FEW} texts or more"
            )
        documents = _stored(runs(list(documents["text"]), validation=split == "validation"))
        said = f"{split}, {SHARE:.0%} held out in sections, by hash"
    prints = [fingerprint(document) for document in documents]
    kept: Sequence[int] = range(len(prints))
    if split != "all" and not cut:
        kept = _held(corpus.name, prints, validation=split == "validation")
        said = f"{split}, {SHARE:.0%} held out by hash"
    kept = sorted(kept, key=prints.__getitem__)[:limit]
    digest = hashlib.sha256(b"".join(prints[i] for i in kept)).hexdigest()
    provenance = {"split": said, **corpus.provenance}
    return replace(corpus, kind=kind, documents=documents.select(kept), digest=digest, provenance=provenance)


def _held(name: str, prints: Sequence[bytes], *, validation: bool) -> list[int]:
    kept = [place for place, side in enumerate(hidden(prints)) if side == validation]
    if not kept:
        raise DataError(f"{name} holds {len(prints)} documents, all alike, so none can be held out; use split=all")
    return kept
