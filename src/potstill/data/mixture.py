"""Several data sets as one: all of their documents, or of each a share, by its weight (`PATH:0.3`) or its size.

An exponent e between 0 and 1 gives data set i with s_i characters the share

    s_i^e / sum_j s_j^e

so that 1 takes all documents, and 0 as much of each. Source: Conneau and Lample, "Cross-lingual Language Model
Pretraining" (arXiv:1901.07291), section 3.1, which draws documents of scarce languages several times.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from datasets import concatenate_datasets

from potstill.core.errors import DataError, UsageError
from potstill.core.in_memory import resolve_path
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.document_table import build_table, get_document_text
from potstill.data.split import fingerprint
from potstill.data.turns import to_messages

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
        unweighted = next(source.name for source in sources if source.weight is None)
        raise UsageError(f"{unweighted} has no weight and others have one; give every --data a weight, or none")
    if duplicates := [name for name, count in Counter(source.name for source in sources).items() if count > 1]:
        raise UsageError(f"--data {duplicates[0]} is given twice; give it once, with a larger weight")
    return sources


def _parse_source(text: str) -> WeightedSource:
    match = None if resolve_path(text).exists() else NAME_AND_WEIGHT.fullmatch(text)
    return WeightedSource(text, None) if match is None else WeightedSource(match["name"], float(match["weight"]))


def load_mixture(
    data: str | os.PathLike[str] | Sequence[str], *, split: str = "train", exponent: float = 1.0, **options: Any
) -> Corpus:
    """The corpus of one data set, or of several of one kind; `options` are those of `load_corpus`.

    Weights and the exponent act on the split that is trained on. Of each data set potstill takes documents, in the
    order of their hashes, until they hold its share of the characters; the scarcest one is taken whole, and no document
    twice. Pairs among chats become chats of two turns.

    Raises: as `load_corpus` does; DataError for data sets of several kinds; UsageError for streams among several, for
    an exponent beside weights, or for one that has nothing to mix.
    """
    sources = parse_sources(data)
    is_trained = split == "train"
    if is_trained:
        _check_exponent(exponent, sources)
    corpora = [load_corpus(source.name, split=split, **options) for source in sources]
    if len(corpora) == 1:
        return corpora[0]
    for corpus in corpora:
        corpus.require_end("a mixture needs whole data sets")
    corpora = _unite_kinds(corpora)
    weights = [source.weight for source in sources]
    if not is_trained or (weights[0] is None and exponent == 1):
        return _join(corpora, [len(corpus) for corpus in corpora], [None] * len(corpora))
    lengths = [[len(get_document_text(document)) for document in corpus.documents] for corpus in corpora]
    powers = [sum(sizes) ** exponent for sizes in lengths]
    shares = [power / sum(powers) if weight is None else weight for power, weight in zip(powers, weights, strict=True)]
    return _join(corpora, _count_documents(lengths, shares), shares)


def _check_exponent(exponent: float, sources: Sequence[WeightedSource]) -> None:
    if not 0 <= exponent <= 1:
        raise UsageError(
            f"--mix-exponent is {exponent}; it goes from 0, equal shares of all data sets, to 1, all documents"
        )
    if exponent == 1:
        return
    if len(sources) == 1:
        raise UsageError("--mix-exponent mixes several data sets; give --data again for each, or omit it")
    if sources[0].weight is not None:
        raise UsageError(f"--mix-exponent and {sources[0].name}:{sources[0].weight} both give shares; omit one of them")


def _unite_kinds(corpora: Sequence[Corpus]) -> list[Corpus]:
    """The corpora, with pairs as chats where another one holds chats.

    Raises: DataError for other kinds among several.
    """
    kinds = {corpus.kind for corpus in corpora}
    if kinds == {"pairs", "chat"}:
        return [corpus if corpus.kind == "chat" else _convert_to_chats(corpus) for corpus in corpora]
    first = corpora[0]
    mismatch = next((corpus for corpus in corpora if corpus.kind != first.kind), None)
    if mismatch is not None:
        raise DataError(
            f"{mismatch.name} holds {mismatch.kind} where {first.name} holds {first.kind}; mix data sets of one kind"
        )
    return list(corpora)


def _convert_to_chats(corpus: Corpus) -> Corpus:
    """Pairs as chats of two turns."""
    chats = (
        {
            "messages": [dict(message) for message in to_messages(document)],
            **{name: value for name, value in document.items() if name not in ("prompt", "response")},
        }
        for document in corpus.documents
    )
    return replace(corpus, kind="chat", documents=build_table(chats))


def _count_documents(lengths: Sequence[Sequence[int]], shares: Sequence[float]) -> list[int]:
    """How many documents of each corpus hold its share of the characters, where the scarcest is taken whole."""
    unit = min(sum(sizes) / share for sizes, share in zip(lengths, shares, strict=True))
    return [_count_until(sizes, unit * share) for sizes, share in zip(lengths, shares, strict=True)]


def _count_until(lengths: Sequence[int], total: float) -> int:
    """How many of the first `lengths` reach `total`, at least one; the rounding of a sum costs no document."""
    num_characters = 0
    for number, length in enumerate(lengths):
        if number and num_characters >= total * (1 - 1e-9):
            return number
        num_characters += length
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
