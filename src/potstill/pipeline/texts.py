"""Text for a stage: a corpus by name, read by a tokenizer, packed for training and kept in rows for measuring."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError, UsageError
from potstill.core.types import Batch
from potstill.data.cache import Cache
from potstill.data.chat import tokenise
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.pack import Packs, collate, pack
from potstill.data.rows import Route
from potstill.data.show import describe
from potstill.data.tokens import TokenSet
from potstill.evaluate.perplexity import bos_of, supervised_rows, text_rows
from potstill.evaluate.reading import Row, require_context
from potstill.models import gguf
from potstill.models.load import load, locate

SAMPLED = 4_000_000  # tokens of a stored corpus that are read to draw packs from: one document may be half a book
MEASURED = 2_000  # characters of a text that are read for measuring, about 500 tokens of English


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text, in windows of which length. Without `eval_data` the corpus' own validation split is held out.

    `columns` says which column is which where their names do not: `prompt=instruction,response=text`. With a `route`
    each document has the number of who is to teach it.
    """

    data: str
    eval_data: str | None = None
    columns: str = ""
    context: int = 512
    seed: int = 1
    route: Route | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Packs to train on, packs and rows to measure on, a digest of it all, and what a card says of them.

    `teacher_rows` are the rows as a teacher of another tokenizer reads them; none where there is no such teacher.
    """

    packs: Packs
    validation_packs: Packs
    rows: Sequence[Row]
    teacher_rows: Sequence[Row]
    digest: str
    facts: Mapping[str, Any]


def prepare(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    models: Sequence[PreTrainedModel] = (),
    documents: int = 100,
    caches: Sequence[Cache] = (),
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prepared:
    """Everything that a training stage reads; with teachers' `caches`, no windows but theirs are trained on.

    Raises:
        DataError, NotFound: as `load_corpus` and `tokenise` do; a route that no document is on.
        UsageError: a context longer than one of `models` can take in.
        CacheMismatch: a cache of another text.
    """
    require_context(text.context, *models)
    corpus = load_corpus(text.data, columns=columns_of(text.columns), route=text.route)
    for cache in caches if corpus.digest is not None else ():  # a stream is known by its windows alone
        cache.require({"text": corpus.digest})
    read = sampled(corpus, tokenizer, tokens=tokens)
    packs = pack(read, length=text.context, seed=text.seed, bos=bos_of(tokenizer), only=held_by(caches))
    routed = {} if text.route is None else {"routes": windows_by_route(packs, text.route, corpus.name)}
    held_out = held_out_corpus(text)
    validation = pack(
        tokenise(held_out, tokenizer, limit=50_000), length=text.context, seed=text.seed, bos=bos_of(tokenizer)
    )
    rows = rows_of(held_out, tokenizer, documents=documents)
    theirs = rows_of(held_out, teacher_tokenizer, documents=documents) if teacher_tokenizer is not None else []
    facts = {
        **facts_of(corpus, packs),
        **routed,
        "measured_on": f"{held_out.name} ({held_out.provenance.get('split', 'all')}), {len(rows)} documents",
        "measured_digest": held_out.digest,
    }
    digest = hashlib.sha256(repr((packs.digest, validation.digest, rows)).encode()).hexdigest()
    return Prepared(
        packs=packs, validation_packs=validation, rows=rows, teacher_rows=theirs, digest=digest, facts=facts
    )


def held_by(caches: Sequence[Cache]) -> Callable[[np.ndarray, np.ndarray], bool] | None:
    """Whether a window is in all caches; None where there are none."""
    return (lambda ids, labels: all(cache.holds(ids, labels) for cache in caches)) if caches else None


def windows_by_route(packs: Packs, route: Route, name: str) -> dict[str, int]:
    """How many windows of the text `name` each value of the route has.

    Raises: DataError where one has none.
    """
    assert packs.routes is not None
    found = np.bincount(packs.routes, minlength=len(route.values)).tolist()
    if 0 in found:
        value = route.values[found.index(0)]
        raise DataError(
            f"no document of {name} that is trained on has {value!r} in `{route.column}`, so the teacher {value!r} "
            f"would teach nothing; leave it out, or give other --data"
        )
    return dict(zip(route.values, found, strict=True))


def sampled(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> TokenSet:
    """Enough documents to draw packs of so many `tokens` from, at random: of a stream no more than twice as many."""
    least = SAMPLED if isinstance(corpus.documents, Dataset) else 0
    return tokenise(corpus, tokenizer, limit=max(2 * tokens, least))


def facts_of(corpus: Corpus, packs: Packs) -> dict[str, Any]:
    """What a card says of the text that a stage read."""
    dropped = {"dropped": dict(corpus.dropped)} if corpus.dropped else {}
    return {
        "trained_on": corpus.name,
        "kind": corpus.kind,
        "licence": corpus.licence,
        "split": corpus.provenance.get("split", "all"),
        "documents": len(packs.lengths),
        "tokens": packs.tokens,
        "trained_share": packs.trained / packs.tokens,
        "fill": packs.fill,
        "text_digest": corpus.digest,
        **dropped,
        "provenance": dict(corpus.provenance),
    }


def held_out_corpus(text: Text) -> Corpus:
    """The text that is measured on: `eval_data`, a file of it whole, or else the validation split of `data`."""
    named, eval_data = columns_of(text.columns), text.data if text.eval_data is None else text.eval_data
    trained, held_out = (Path(name).expanduser().resolve() for name in (text.data, eval_data))
    if eval_data == text.data or (held_out.exists() and held_out == trained):
        return load_corpus(text.data, split="validation", columns=named, route=text.route)
    if held_out.exists() and (trained in held_out.parents or held_out in trained.parents):
        raise UsageError(
            f"--eval-data {text.eval_data} and --data {text.data} lie in one another, so what is measured would be "
            f"trained on; keep them apart"
        )
    split = "all" if held_out.is_file() else "validation"
    return load_corpus(eval_data, split=split, columns=named, route=text.route)


def columns_of(said: str) -> dict[str, str] | None:
    """`prompt=instruction,response=text` as `{"prompt": "instruction", "response": "text"}`; None where it is empty.

    Raises: UsageError.
    """
    if not said:
        return None
    pairs = [pair.partition("=") for pair in said.split(",")]
    if not all(name and column for name, _, column in pairs):
        raise UsageError(f"--columns {said!r} is not NAME=COLUMN,... such as prompt=instruction,response=text")
    return {name.strip(): column.strip() for name, _, column in pairs}


def rows_of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, documents: int) -> Sequence[Row]:
    """The first `documents` documents as rows to score: what the assistant says in chats, or texts.

    Of a text its first 2,000 characters are read, so that a hundred chapters cost hardly more than a hundred pages.

    Raises: DataError if none of them has a token to score.
    """
    if corpus.kind == "text":
        texts = [one["text"][:MEASURED] for one in corpus.documents.take(documents)]
        rows = [row for row in text_rows(texts, tokenizer) if row.size]
    else:
        some = replace(corpus, documents=corpus.documents.take(documents))  # of a stream, no more than these
        read = tokenise(some, tokenizer, plain=True)
        rows = list(supervised_rows(((one.input_ids, one.labels) for one in read), tokenizer))
    if not rows:
        raise DataError(f"the held-out part of {corpus.name} has no token to score; give --eval-data")
    return rows


def calibration(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, tokens: int, batch_tokens: int = 2048
) -> tuple[list[Batch], dict[str, Any]]:
    """Some `tokens` of training text as batches of one size, for measuring importance, and what a card says of it."""
    corpus = load_corpus(text.data, columns=columns_of(text.columns))
    read = sampled(corpus, tokenizer, tokens=tokens)
    length = min(text.context, batch_tokens)
    packs = pack(read, length=length, seed=text.seed, bos=bos_of(tokenizer))
    each = max(1, batch_tokens // length)
    starts = range(0, min(len(packs), max(each, tokens // length)), each)
    batches: list[Batch] = [
        collate([packs[i] for i in range(start, min(start + each, len(packs)))]) for start in starts
    ]
    facts = facts_of(corpus, packs)
    return batches, {"calibrated_on": facts.pop("trained_on"), **facts}


def described(name: str, tokenizer: str, *, context: int, split: str, columns: str = "") -> dict[str, Any]:
    """What a data set is and which of its tokens are trained, as `data.show.describe` says it.

    Raises: NotFound, DataError; UsageError for a context without room.
    """
    if context < 2:
        raise UsageError(f"--context {context} has no room for a token and what it is predicted from")
    corpus = load_corpus(name, split=split, columns=columns_of(columns))
    return describe(corpus, tokenizer_of(tokenizer), length=context)


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of a GGUF file without reading its weights."""
    path = locate(name)
    return gguf.load_tokenizer(path) if path.suffix == ".gguf" else load(path).tokenizer
