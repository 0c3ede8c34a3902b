"""Loads a corpus by name: a file, a folder, a data set of the Hugging Face hub, or a corpus of docstrings.

`docstrings` and `stdlib` are those of `data.docstrings`. Any other name of an existing file or folder means that path.
Otherwise `owner/name` or `owner/name:config` is a hub data set, which is streamed. The validation split is that of the
source (files or splits named train and validation, or test); without one, a twentieth is held out by hash
(`data.split`).
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from datasets import Dataset, IterableDataset, concatenate_datasets

from potstill.core.errors import DataError, NotFound, UsageError
from potstill.core.in_memory import resolve_path
from potstill.core.suggestions import suggest_path
from potstill.data import docstrings, hub
from potstill.data.document_table import build_table, get_features, get_kind
from potstill.data.files import (
    Record,
    assign_splits,
    find_license,
    get_format,
    get_names,
    is_held_out,
    list_files,
    read_records,
)
from potstill.data.pack_fields import LABEL_FIELDS
from potstill.data.preference_schema import is_preference_row
from potstill.data.row_reader import DocumentLabel, RowReader, check_bad_row_policy
from potstill.data.schema import Kind, Recognizer, recognize_schema
from potstill.data.split import (
    MIN_DOCUMENTS,
    VALIDATION_SHARE,
    choose_held_out,
    fingerprint,
    hash_content,
    is_in_share,
    split_texts,
)
from potstill.data.trees import is_message_row

Split = Literal["train", "validation", "all"]
Item = TypeVar("Item")
NAMED_SPLITS = "as its files or splits are named"
HELD_OUT_DUPLICATE = "content that is held out"  # why a document is left out of training
PREVIEW_ROWS = 256  # rows read of a stream to recognize its kind


@dataclass(frozen=True)
class Corpus:
    """Documents of one kind, and their source.

    The columns of `documents` are `text` and `whole` | `prompt`, `response` | `messages` and `tools`, as `data.turns`
    writes them | of preferences, lists of such turns in `prompt`, `chosen` and `rejected`, with `label` and `tools` |
    of prompts, such a list in `prompt`, and the whole `row` as JSON, with `tools`.
    `whole` is false for a section of a text that continues after it, so that no end-of-text token follows. With a
    label, a column holds its number, which does not enter the digest.

    Documents are in the order of their hashes, so that the first ones are a fair sample; a stream keeps its own order.
    `digest` is the SHA-256 of all of them, None for a stream. `drop_counts` are the rows that were left out, by reason,
    and `bad_rows` names the first three that could not be read.
    """

    name: str
    kind: Kind
    documents: Dataset | IterableDataset
    digest: str | None
    license: str | None
    provenance: Mapping[str, Any]
    drop_counts: Mapping[str, int] = field(default_factory=dict)
    bad_rows: Sequence[str] = ()

    def require_end(self, reason: str) -> Dataset:
        """The documents, which are all here.

        Raises: UsageError with the `reason` for a stream.
        """
        if isinstance(self.documents, Dataset):
            return self.documents
        raise UsageError(f"{self.name} is streamed, and {reason}; download it first")

    def __len__(self) -> int:
        """The number of documents.

        Raises: TypeError for a stream, whose length is unknown.
        """
        return len(self.documents)


def load_corpus(
    name: str | os.PathLike[str],
    *,
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    label: DocumentLabel | None = None,
    on_bad_row: str = "refuse",
    recognize: Recognizer = recognize_schema,
) -> Corpus:
    """Loads the corpus of that name or path.

    `split` is `train`, `validation` or `all`. `limit` keeps only the first documents. `columns` maps the meaning to the
    column name: `{"text": ...}`, `{"prompt": ..., "response": ...}` or `{"messages": ...}`. `label` adds a number
    to each document. A row that cannot be read is refused, or with `on_bad_row="skip"` left out and counted.
    `recognize` finds the schema of the rows; that of `data.preference_schema` reads preferences, which else are
    refused. Preferences are held out by their prompts, and never streamed.

    Raises: NotFound; UsageError for a wrong option; DataError for a data set that is broken, empty or of another shape.
    """
    corpus_split = _parse_split(split)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; at least one document is needed")
    reader = RowReader(columns, label, on_bad_row=check_bad_row_policy(on_bad_row), recognize=recognize)
    path = resolve_path(name := os.fspath(name))
    if name in docstrings.CORPORA:
        if label is not None:
            raise UsageError(f"{name} has no column {label.column!r}; give other --data")
        return _load_docstrings(name, corpus_split, limit)
    if path.exists():
        return _load_local(name, path, corpus_split, limit, reader)
    if hub.DATASET_ID.fullmatch(name) and not get_format(path):
        return _load_from_hub(name, corpus_split, limit, reader)
    raise NotFound(f"there is no file or folder {name}{suggest_path(path)}; a data set of the hub is called owner/name")


def remove_held_out(corpus: Corpus, held_out: Iterable[Mapping[str, Any]]) -> Corpus:
    """`corpus` without the documents whose content is also in `held_out`; `drop_counts` has their number.

    The digest stays that of all documents, so a cache of them fits. Those of a stream are counted as it is read.

    Raises: DataError if no document is left.
    """
    held_out_digests = {hash_content(document) for document in held_out}

    def is_left(document: Mapping[str, Any]) -> bool:
        return hash_content(document) not in held_out_digests

    if not isinstance(corpus.documents, Dataset):
        counts = cast(Counter[str], corpus.drop_counts)

        def is_left_and_counted(document: Mapping[str, Any]) -> bool:
            is_counted = not is_left(document)
            counts[HELD_OUT_DUPLICATE] += is_counted
            return not is_counted

        return replace(corpus, documents=corpus.documents.filter(is_left_and_counted))
    indices = [i for i, document in enumerate(corpus.documents) if is_left(document)]
    num_removed = len(corpus) - len(indices)
    if not num_removed:
        return corpus
    if not indices:
        raise DataError(f"all {len(corpus)} documents of {corpus.name} are held out too; give other --eval-data")
    drop_counts = {**corpus.drop_counts, HELD_OUT_DUPLICATE: num_removed}
    return replace(corpus, documents=corpus.documents.select(indices), drop_counts=drop_counts)


def _parse_split(split: str) -> Split:
    for choice in get_args(Split):
        if choice == split:
            return cast(Split, choice)
    raise UsageError(f"split is {split!r}; it can be {', '.join(get_args(Split))}")


def _load_docstrings(name: str, split: Split, limit: int | None) -> Corpus:
    source = docstrings.CORPORA[name]()
    documents = build_table({"text": text, "whole": True} for text in source.texts)
    provenance = {"source": name, **source.versions}
    return _take_split(Corpus(name, "text", documents, None, source.license, provenance), split, limit)


def _load_local(name: str, path: Path, split: Split, limit: int | None, reader: RowReader) -> Corpus:
    files = list_files(path)
    names = get_names(path, files)
    splits = assign_splits(names) if path.is_dir() else None
    held_out = _list_held_out(names, splits)
    files, hash_split = _select_parts(files, splits, split)
    document_streams = (reader.read_documents(read_records(file), source=_describe_file(file)) for file in files)
    documents = build_table(chain.from_iterable(document_streams))
    provenance = {"source": name, "files": len(files), "held_out": held_out if split == "train" else []}
    corpus = Corpus(name, "text", documents, None, find_license(path), provenance)
    return _take_split(_add_reader_report(corpus, reader, has_named_splits=hash_split != split), hash_split, limit)


def _load_from_hub(name: str, split: Split, limit: int | None, reader: RowReader) -> Corpus:
    source = hub.HubDataset(name)
    names = source.list_splits()
    splits = assign_splits(names)
    split_names, hash_split = _select_parts(names, splits, split)
    held_out = _list_held_out(names, splits) if split == "train" else []
    provenance = {
        "source": f"hub: {name}",
        "revision": source.revision,
        "splits": split_names,
        "held_out": held_out,
    }
    corpus = Corpus(name, "text", Dataset.from_dict({}), None, source.license, provenance)
    parts = [source.load_rows(part) for part in split_names]
    first_row: Mapping[str, Any] = next(
        iter(parts[0]), {}
    )  # a tree of messages is in many rows, and preferences are held out by prompt
    if source.is_offline or is_message_row(first_row) or is_preference_row(first_row, reader.columns):
        document_streams = (reader.read_documents(number_rows(part, name), source=name) for part in parts)
        corpus = replace(corpus, documents=build_table(chain.from_iterable(document_streams)))
        return _take_split(_add_reader_report(corpus, reader, has_named_splits=hash_split != split), hash_split, limit)
    with hub.explain_hub_errors(name):
        return stream_corpus(corpus, concatenate_datasets(parts), reader, hash_split, limit)


def number_rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Record]:
    """Rows with the place that an error names."""
    return (Record(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1))


def stream_corpus(corpus: Corpus, rows: IterableDataset, reader: RowReader, split: Split, limit: int | None) -> Corpus:
    """`corpus` with the share `split` of a stream of `rows`, chosen by hash and read on demand.

    `drop_counts` grows while the stream is read.
    """
    preview = list(islice(rows, PREVIEW_ROWS))
    first_document = next(reader.read_documents(number_rows(preview, corpus.name), source=corpus.name), None)
    if first_document is None:
        raise DataError(_describe_empty(corpus.name, reader))
    kind, features = get_kind(first_document), get_features(first_document)
    reader.drop_counts.clear()
    reader.bad_rows.clear()

    def read_batch(table: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        batch = (dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True))
        records = (Record(row, f"{corpus.name}, row {index + 1}") for row, index in zip(batch, indices, strict=True))
        documents = reader.read_documents(records, source=corpus.name)
        selected = [
            document
            for document in documents
            if split == "all" or is_in_share(fingerprint(document)) == (split == "validation")
        ]
        return {column: [document.get(column) for document in selected] for column in features}

    stream = rows.map(read_batch, batched=True, with_indices=True, remove_columns=list(preview[0]), features=features)
    stream = stream if limit is None else stream.take(limit)
    split_note = split if split == "all" else f"{split}, {VALIDATION_SHARE:.0%} held out by hash"
    provenance = {"split": split_note, **corpus.provenance, **_name_columns(reader)}
    corpus = replace(corpus, kind=kind, documents=stream, provenance=provenance)
    return replace(corpus, drop_counts=reader.drop_counts, bad_rows=reader.bad_rows)


def _describe_file(file: Path) -> str:
    """The name that an error about columns gives to a file; for a CSV file it names the header."""
    return f"the header of {file}" if get_format(file) in (".csv", ".tsv") else str(file)


def _list_held_out(names: Sequence[str], splits: tuple[list[int], list[int]] | None) -> list[str]:
    """The names of files or splits that are not trained on because of their names."""
    return [] if splits is None else [name for i, name in enumerate(names) if i not in splits[0] and is_held_out(name)]


def _select_parts(
    items: list[Item], splits: tuple[list[int], list[int]] | None, split: Split
) -> tuple[list[Item], Split]:
    """The files or splits to read, and the share of their documents to take by hash."""
    if splits is None or split == "all":
        return items, split
    train, validation = splits
    if not validation:
        return [items[i] for i in train], split
    return [items[i] for i in (train if split == "train" else validation)], "all"


def _add_reader_report(corpus: Corpus, reader: RowReader, *, has_named_splits: bool) -> Corpus:
    """`corpus` with the unread columns and dropped rows of its reader."""
    if not len(corpus):
        raise DataError(_describe_empty(corpus.name, reader))
    provenance = {**corpus.provenance, **_name_columns(reader)}
    provenance |= {"split": NAMED_SPLITS} if has_named_splits else {}
    return replace(corpus, provenance=provenance, drop_counts=dict(reader.drop_counts), bad_rows=list(reader.bad_rows))


def _name_columns(reader: RowReader) -> dict[str, list[str]]:
    """The columns that were read, those that were not, and of the latter those that hold text."""
    return {name: sorted(getattr(reader, name)) for name in ("read_columns", "unread_columns", "unread_text")}


def _describe_empty(name: str, reader: RowReader) -> str:
    if not reader.drop_counts:
        return f"{name} is empty: it has no documents"
    reasons = ", ".join(f"{count} with {reason}" for reason, count in reader.drop_counts.items())
    examples = f"; {'; '.join(reader.bad_rows)}" if reader.bad_rows else ""
    return f"{name} holds nothing to train on: {reasons}{examples}"


def _take_split(corpus: Corpus, split: Split, limit: int | None) -> Corpus:
    """The share `split` of a corpus, in the order of its documents' hashes."""
    documents, kind = corpus.documents, get_kind(corpus.documents.features)
    split_note, needs_sections = str(split), split != "all" and kind == "text" and len(documents) < MIN_DOCUMENTS
    if needs_sections:
        if labels := sorted(LABEL_FIELDS.keys() & documents.features.keys()):
            raise DataError(
                f"{corpus.name} holds {len(documents)} texts, which are cut into sections, and sections have no "
                f"{labels[0]}; give {MIN_DOCUMENTS} texts or more"
            )
        documents = build_table(split_texts(list(documents["text"]), validation=split == "validation"))
        split_note = f"{split}, {VALIDATION_SHARE:.0%} held out in sections, by hash"
    fingerprints = [fingerprint(document) for document in documents]
    selected: Sequence[int] = range(len(fingerprints))
    if split != "all" and kind in ("preferences", "prompts"):
        prompts = [hash_content(document) for document in documents]
        selected = _select_held_out(corpus.name, prompts, "prompts", validation=split == "validation", least=2)
        split_note = f"{split}, {VALIDATION_SHARE:.0%} of the prompts held out by hash"
    elif split != "all" and not needs_sections:
        selected = _select_held_out(corpus.name, fingerprints, validation=split == "validation")
        split_note = f"{split}, {VALIDATION_SHARE:.0%} held out by hash"
    selected = sorted(selected, key=fingerprints.__getitem__)[:limit]
    digest = hashlib.sha256(b"".join(fingerprints[i] for i in selected)).hexdigest()
    provenance = {"split": split_note, **corpus.provenance}
    return replace(corpus, kind=kind, documents=documents.select(selected), digest=digest, provenance=provenance)


def _select_held_out(
    name: str, keys: Sequence[bytes], noun: str = "documents", *, validation: bool, least: int = 1
) -> list[int]:
    held_out = choose_held_out(keys, least=least)
    selected = [index for index, is_held_out in enumerate(held_out) if is_held_out == validation]
    if not selected:
        raise DataError(f"{name} holds no two different {noun}, so none can be held out; give more of them")
    return selected
