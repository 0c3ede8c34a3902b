"""Several data sets as one: all of their documents, or of each the share that its weight says (`PATH:0.3`)."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from potstill.core.errors import DataError, UsageError
from potstill.core.in_memory import resolve_path
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.document_table import get_document_text
from potstill.data.split import fingerprint

NAME_AND_WEIGHT = re.compile(r"(?P<name>.+):(?P<weight>\d*\.?\d+(?:[eE]-?\d+)?)")
LIMITED_BY_WEIGHT = "a document beyond the share of its data set"


class WeightedSource(NamedTuple):
    """The name of a data set, and its share of the text; None where none is given."""

    name: str
    weight: float | None


def parse_sources(data: str | os.PathLike[str] | Sequence[str]) -> tuple[WeightedSource, ...]:
    """The data sets that `data` names, each with its weight.

    Raises: UsageError for a weight of 0, a weight on some of them only, or a data set that is given twice.
    """
    names = [os.fspath(data)] if isinstance(data, str | os.PathLike) else [os.fspath(name) for name in data]
    sources = tuple(map(_parse_source, names))
    if any(source.weight == 0 for source in sources):
        raise UsageError("a data set has the weight 0; leave it out")
    if len({source.weight is None for source in sources}) > 1:
        without = next(source.name for source in sources if source.weight is None)
        raise UsageError(f"{without} has no weight and others have one; give every --data a weight, or none")
    if duplicates := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        raise UsageError(f"--data {duplicates[0]} is given twice; give it once, with a larger weight")
    return sources


def _parse_source(text: str) -> WeightedSource:
    match = None if resolve_path(text).exists() else NAME_AND_WEIGHT.fullmatch(text)
    return WeightedSource(text, None) if match is None else WeightedSource(match["name"], float(match["weight"]))


def load_mixture(data: str | os.PathLike[str] | Sequence[str], *, split: str = "train", **options: Any) -> Corpus:
    """The corpus of one data set, or of several of one kind; `options` are those of `load_corpus`.

    Weights act on the split that is trained on. Of each data set potstill takes documents, in the order of their
    hashes, until they hold its share of the characters; the scarcest one is taken whole, and no document twice.

    Raises: as `load_corpus` does; DataError for data sets of several kinds; UsageError for streams among several.
    """
    sources = parse_sources(data)
    corpora = [load_corpus(source.name, split=split, **options) for source in sources]
    if len(corpora) == 1:
        return corpora[0]
    first = corpora[0]
    for corpus in corpora:
        if corpus.kind != first.kind:
            raise DataError(
                f"{corpus.name} holds {corpus.kind} where {first.name} holds {first.kind}; mix data sets of one kind"
            )
        if not isinstance(corpus.documents, Dataset):
            raise UsageError(f"{corpus.name} is streamed, and a mixture needs whole data sets; download it first")
    weights = [source.weight for source in sources if source.weight is not None] if split == "train" else []
    counts = _count_documents(corpora, weights) if weights else [len(corpus) for corpus in corpora]
    return _join(corpora, counts, [*weights] or [None] * len(corpora))


def _count_documents(corpora: Sequence[Corpus], weights: Sequence[float]) -> list[int]:
    """How many documents of each corpus hold its share of the characters, where the scarcest is taken whole."""
    sizes = [[len(get_document_text(document)) for document in corpus.documents] for corpus in corpora]
    unit = min(sum(lengths) / weight for lengths, weight in zip(sizes, weights, strict=True))
    return [_count_until(lengths, unit * weight) for lengths, weight in zip(sizes, weights, strict=True)]


def _count_until(lengths: Sequence[int], total: float) -> int:
    """How many of the first `lengths` reach `total`, at least one; the rounding of a sum costs no document."""
    reached = 0
    for number, length in enumerate(lengths):
        if number and reached >= total * (1 - 1e-9):
            return number
        reached += length
    return len(lengths)


def _join(corpora: Sequence[Corpus], counts: Sequence[int], weights: Sequence[float | None]) -> Corpus:
    """One corpus of the first documents of each, in the order of their hashes."""
    parts = [corpus.documents.select(range(count)) for corpus, count in zip(corpora, counts, strict=True)]
    documents = concatenate_datasets(parts)
    fingerprints = [fingerprint(document) for document in documents]
    order = sorted(range(len(fingerprints)), key=fingerprints.__getitem__)
    digest = hashlib.sha256(b"".join(fingerprints[i] for i in order)).hexdigest()
    drop_counts = sum((Counter(corpus.drop_counts) for corpus in corpora), Counter())
    drop_counts += Counter({LIMITED_BY_WEIGHT: sum(map(len, corpora)) - sum(counts)})
    provenance: dict[str, Any] = {
        key: [entry for corpus in corpora for entry in corpus.provenance.get(key, [])]
        for key in ("held_out", "read_columns", "unread_columns", "unread_text")
    }
    provenance["split"] = "; ".join(dict.fromkeys(str(corpus.provenance.get("split", "all")) for corpus in corpora))
    provenance["sources"] = [
        {**corpus.provenance, "weight": weight, "documents": count, "digest": corpus.digest}
        for corpus, weight, count in zip(corpora, weights, counts, strict=True)
    ]
    return Corpus(
        name=" + ".join(corpus.name for corpus in corpora),
        kind=corpora[0].kind,
        documents=documents.select(order),
        digest=digest,
        license="; ".join(dict.fromkeys(corpus.license for corpus in corpora if corpus.license)) or None,
        provenance=provenance,
        drop_counts=dict(drop_counts),
        bad_rows=[row for corpus in corpora for row in corpus.bad_rows],
    )
