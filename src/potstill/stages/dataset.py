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
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.packing import Packs, collate, pack
from potstill.data.preview import describe
from potstill.data.row_reader import Route
from potstill.data.token_dataset import TokenDataset
from potstill.data.tokenize import tokenize_corpus
from potstill.evaluate.perplexity import build_supervised_rows, build_text_rows, get_bos_id
from potstill.evaluate.scoring_windows import Row, check_context
from potstill.models import gguf
from potstill.models.load import load_model, locate_model
from potstill.teachers.cached import TeacherCache

MIN_SAMPLED_TOKENS = (
    4_000_000  # tokens of a stored corpus that are read to draw packs from: one document may be half a book
)
MAX_MEASURED_CHARACTERS = 2_000  # characters of a text that are read for measuring, about 500 tokens of English


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
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
class PreparedDataset:
    """Packs to train on, packs and rows to measure on, a digest of it all, and what a card says of them.

    `teacher_rows` are the rows as a teacher of another tokenizer reads them; none where there is no such teacher.
    """

    packs: Packs
    validation_packs: Packs
    rows: Sequence[Row]
    teacher_rows: Sequence[Row]
    digest: str
    facts: Mapping[str, Any]


def prepare_dataset(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    models: Sequence[PreTrainedModel] = (),
    documents: int = 100,
    caches: Sequence[TeacherCache] = (),
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreparedDataset:
    """Everything that a training stage reads; with teachers' `caches`, no windows but theirs are trained on.

    Raises:
        DataError, NotFound: as `load_corpus` and `tokenise` do; a route that no document is on.
        UsageError: a context longer than one of `models` can take in.
        CacheMismatch: a cache of another text.
    """
    check_context(config.context, *models)
    corpus = load_corpus(config.data, columns=parse_columns(config.columns), route=config.route)
    for cache in caches if corpus.digest is not None else ():  # a stream is known by its windows alone
        cache.check_facts({"text": corpus.digest})
    token_set = tokenize_sample(corpus, tokenizer, tokens=tokens)
    packs = pack(
        token_set,
        length=config.context,
        seed=config.seed,
        bos=get_bos_id(tokenizer),
        keep_window=make_window_filter(caches),
    )
    route_facts = {} if config.route is None else {"routes": count_windows_by_route(packs, config.route, corpus.name)}
    validation_corpus = load_held_out_corpus(config)
    validation_packs = pack(
        tokenize_corpus(validation_corpus, tokenizer, limit=50_000),
        length=config.context,
        seed=config.seed,
        bos=get_bos_id(tokenizer),
    )
    rows = build_rows(validation_corpus, tokenizer, documents=documents)
    teacher_rows = (
        build_rows(validation_corpus, teacher_tokenizer, documents=documents) if teacher_tokenizer is not None else []
    )
    split = validation_corpus.provenance.get("split", "all")
    facts = {
        **build_corpus_facts(corpus, packs),
        **route_facts,
        "measured_on": f"{validation_corpus.name} ({split}), {len(rows)} documents",
        "measured_digest": validation_corpus.digest,
    }
    digest = hashlib.sha256(repr((packs.digest, validation_packs.digest, rows)).encode()).hexdigest()
    return PreparedDataset(
        packs=packs, validation_packs=validation_packs, rows=rows, teacher_rows=teacher_rows, digest=digest, facts=facts
    )


def make_window_filter(caches: Sequence[TeacherCache]) -> Callable[[np.ndarray, np.ndarray], bool] | None:
    """Whether a window is in all caches; None where there are none."""
    return (lambda ids, labels: all(cache.has_window(ids, labels) for cache in caches)) if caches else None


def count_windows_by_route(packs: Packs, route: Route, name: str) -> dict[str, int]:
    """How many windows of the text `name` each value of the route has.

    Raises: DataError where one has none.
    """
    counts = np.bincount(packs.fields["routes"], minlength=len(route.values)).tolist()
    if 0 in counts:
        value = route.values[counts.index(0)]
        raise DataError(
            f"no document of {name} that is trained on has {value!r} in `{route.column}`, so the teacher {value!r} "
            f"would teach nothing; leave it out, or give other --data"
        )
    return dict(zip(route.values, counts, strict=True))


def tokenize_sample(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, tokens: int) -> TokenDataset:
    """Enough documents to draw packs of so many `tokens` from, at random: of a stream no more than twice as many."""
    minimum = MIN_SAMPLED_TOKENS if isinstance(corpus.documents, Dataset) else 0
    return tokenize_corpus(corpus, tokenizer, limit=max(2 * tokens, minimum))


def build_corpus_facts(corpus: Corpus, packs: Packs) -> dict[str, Any]:
    """What a card says of the text that a stage read."""
    dropped = {"dropped": dict(corpus.dropped)} if corpus.dropped else {}
    return {
        "trained_on": corpus.name,
        "kind": corpus.kind,
        "licence": corpus.license,
        "split": corpus.provenance.get("split", "all"),
        "documents": len(packs.lengths),
        "tokens": packs.num_tokens,
        "trained_share": packs.num_trained / packs.num_tokens,
        "fill": packs.fill,
        "text_digest": corpus.digest,
        **({"dropped_groups": packs.num_dropped_groups} if packs.num_dropped_groups else {}),
        **dropped,
        "provenance": dict(corpus.provenance),
    }


def load_held_out_corpus(config: DatasetConfig) -> Corpus:
    """The text that is measured on: `eval_data`, a file of it whole, or else the validation split of `data`."""
    columns, eval_data = parse_columns(config.columns), config.data if config.eval_data is None else config.eval_data
    data_path, eval_path = (Path(name).expanduser().resolve() for name in (config.data, eval_data))
    if eval_data == config.data or (eval_path.exists() and eval_path == data_path):
        return load_corpus(config.data, split="validation", columns=columns, route=config.route)
    if eval_path.exists() and (data_path in eval_path.parents or eval_path in data_path.parents):
        raise UsageError(
            f"--eval-data {config.eval_data} and --data {config.data} lie in one another, so what is measured would be "
            f"trained on; keep them apart"
        )
    split = "all" if eval_path.is_file() else "validation"
    return load_corpus(eval_data, split=split, columns=columns, route=config.route)


def parse_columns(option: str) -> dict[str, str] | None:
    """`prompt=instruction,response=text` as `{"prompt": "instruction", "response": "text"}`; None where it is empty.

    Raises: UsageError.
    """
    if not option:
        return None
    pairs = [pair.partition("=") for pair in option.split(",")]
    if not all(name and column for name, _, column in pairs):
        raise UsageError(f"--columns {option!r} is not NAME=COLUMN,... such as prompt=instruction,response=text")
    return {name.strip(): column.strip() for name, _, column in pairs}


def build_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, documents: int) -> Sequence[Row]:
    """The first `documents` documents as rows to score: what the assistant says in chats, or texts.

    Of a text its first 2,000 characters are read, so that a hundred chapters cost hardly more than a hundred pages.

    Raises: DataError if none of them has a token to score.
    """
    if corpus.kind == "text":
        texts = [document["text"][:MAX_MEASURED_CHARACTERS] for document in corpus.documents.take(documents)]
        rows = [row for row in build_text_rows(texts, tokenizer) if row.num_bytes]
    else:
        limited_corpus = replace(corpus, documents=corpus.documents.take(documents))  # of a stream, no more than these
        token_set = tokenize_corpus(limited_corpus, tokenizer, plain=True)
        rows = list(build_supervised_rows(((document.input_ids, document.labels) for document in token_set), tokenizer))
    if not rows:
        raise DataError(f"the held-out part of {corpus.name} has no token to score; give --eval-data")
    return rows


def load_calibration_batches(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, tokens: int, batch_tokens: int = 2048
) -> tuple[list[Batch], dict[str, Any]]:
    """Some `tokens` of training text as batches of one size, for measuring importance, and what a card says of it."""
    corpus = load_corpus(config.data, columns=parse_columns(config.columns))
    token_set = tokenize_sample(corpus, tokenizer, tokens=tokens)
    length = min(config.context, batch_tokens)
    packs = pack(token_set, length=length, seed=config.seed, bos=get_bos_id(tokenizer))
    batch_size = max(1, batch_tokens // length)
    starts = range(0, min(len(packs), max(batch_size, tokens // length)), batch_size)
    batches: list[Batch] = [
        collate([packs[i] for i in range(start, min(start + batch_size, len(packs)))]) for start in starts
    ]
    facts = build_corpus_facts(corpus, packs)
    return batches, {"calibrated_on": facts.pop("trained_on"), **facts}


def describe_dataset(name: str, tokenizer: str, *, context: int, split: str, columns: str = "") -> dict[str, Any]:
    """What a data set is and which of its tokens are trained, as `data.show.describe` says it.

    Raises: NotFound, DataError; UsageError for a context without room.
    """
    if context < 2:
        raise UsageError(f"--context {context} has no room for a token and what it is predicted from")
    corpus = load_corpus(name, split=split, columns=parse_columns(columns))
    return describe(corpus, load_tokenizer(tokenizer), length=context)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of a GGUF file without reading its weights."""
    path = locate_model(name)
    return gguf.load_tokenizer(path) if path.suffix == ".gguf" else load_model(path).tokenizer
