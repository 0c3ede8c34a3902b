"""The text of a stage: packs to train on, and documents to measure on."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError, UsageError
from potstill.core.in_memory import resolve_path
from potstill.core.screen import status
from potstill.core.types import Batch
from potstill.data.corpus import Corpus, remove_held_out
from potstill.data.files import has_named_splits
from potstill.data.long_documents import choose_long_documents
from potstill.data.mixture import load_mixture, parse_sources
from potstill.data.packing import Packs, collate, pack
from potstill.data.row_reader import DocumentLabel, Route
from potstill.data.token_dataset import TextReport, TokenDataset
from potstill.data.tokenize import Rendering, tokenize_corpus
from potstill.data.turns import is_trained, to_messages
from potstill.evaluate.answer_rows import LabeledDocument, build_answer_rows
from potstill.evaluate.perplexity import build_text_rows, get_bos_id
from potstill.evaluate.scoring_windows import Row, check_context
from potstill.models import gguf
from potstill.models.load import load_model
from potstill.models.locate import locate_model
from potstill.stages.corpus import load_data
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.options import TextOptions
from potstill.stages.reading_report import build_corpus_facts, report_reading
from potstill.stages.text_options import make_rendering, prepare_tokenizer
from potstill.teachers.cached import TeacherCache

MIN_SAMPLED_TOKENS = 4_000_000  # read at least these of a stored corpus: one document may be half a book
HELD_OUT_TOKENS = 50_000  # of the validation packs
MAX_STREAMED_DOCUMENTS = 1_000  # of a held-out stream, looked up among those to train on
MAX_MEASURED_CHARACTERS = 2_000  # of a document that is measured; about 500 tokens of English


@dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """Packs to train on, packs and rows to measure on, a digest of them, and the facts for the card.

    `teacher_rows` are the same documents as a teacher of another tokenizer or chat template reads them; empty without
    one.
    """

    packs: Packs
    validation_packs: Packs
    rows: Sequence[Row]
    teacher_rows: Sequence[Row]
    digest: str
    facts: Mapping[str, Any]


@status("reading the text")
def prepare_dataset(
    config: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int | None,
    models: Sequence[PreTrainedModel] = (),
    documents: int = 100,
    caches: Sequence[TeacherCache] = (),
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreparedDataset:
    """Read and pack the text; with `caches`, only windows that every cache holds are trained on.

    Without `tokens` all of the text is read, for epochs.

    Raises:
        DataError, NotFound: as `load_corpus` and `tokenize_corpus` do; a route without a document.
        UsageError: a context longer than one of `models` can read; a stream without `tokens`.
        CacheMismatch: a cache of another text.
    """
    check_context(config.context, *models)
    rendering = make_rendering(config)
    corpus = load_data(config, label=config.label)
    check_has_end(corpus, tokens)
    for cache in caches if corpus.digest is not None else ():  # a stream has no digest but those of its windows
        cache.check_facts({"text": corpus.digest})
    held_out = load_held_out_corpus(config)
    corpus = remove_held_out(corpus, list_held_out_documents(held_out))
    bos, keep_window = get_bos_id(tokenizer), make_window_filter(caches)
    token_set = tokenize_sample(corpus, tokenizer, tokens=tokens, rendering=rendering)
    chosen_set, long_facts = choose_long_documents(token_set, config.long_documents, seed=config.seed, name=corpus.name)
    packs = pack(chosen_set, length=config.context, seed=config.seed, bos=bos, keep_window=keep_window)
    report_reading(corpus, packs, token_set.report)
    held_out_tokens = tokenize_corpus(held_out, tokenizer, limit=HELD_OUT_TOKENS, rendering=rendering)
    validation_packs = pack(held_out_tokens, length=config.context, seed=config.seed, bos=bos)
    build_rows_of = partial(build_rows, held_out, documents=documents, rendering=rendering)
    rows = build_rows_of(tokenizer)
    facts = {
        **build_corpus_facts(corpus, packs, token_set.report),
        **count_windows_by_route(packs, config.label, corpus.name),
        **long_facts,
        "measured_on": f"{held_out.name} ({held_out.provenance.get('split', 'all')}), {len(rows)} documents"
        f"{describe_answers(config)}",
        "measured_digest": compute_measured_digest(held_out, documents=documents, only_last=rendering.only_last),
    }
    return PreparedDataset(
        packs=packs,
        validation_packs=validation_packs,
        rows=rows,
        teacher_rows=build_rows_of(teacher_tokenizer) if teacher_tokenizer else [],
        digest=_compute_digest(packs, validation_packs, rows),
        facts=facts,
    )


def _compute_digest(packs: Packs, validation_packs: Packs, rows: Sequence[Row]) -> str:
    """SHA-256 of packs and rows; checkpoints store it, so the spelling of a row stays whatever the class is called."""
    spelled = ", ".join(
        f"Row(input_ids={row.input_ids!r}, labels={row.labels!r}, size={row.num_bytes}, prefix={row.prefix_length})"
        for row in rows
    )
    return hashlib.sha256(f"({packs.digest!r}, {validation_packs.digest!r}, [{spelled}])".encode()).hexdigest()


def make_window_filter(caches: Sequence[TeacherCache]) -> Callable[[np.ndarray, np.ndarray], bool] | None:
    """A function that says whether all caches hold a window; None without caches."""
    return (lambda ids, labels: all(cache.has_window(ids, labels) for cache in caches)) if caches else None


def count_windows_by_route(packs: Packs, route: DocumentLabel | None, name: str) -> dict[str, dict[str, int]]:
    """`routes`, the number of windows of the corpus `name` for each value of a route; without a route nothing.

    Raises: DataError where a value has none.
    """
    if not isinstance(route, Route):
        return {}
    counts = np.bincount(packs.fields["routes"], minlength=len(route.values)).tolist()
    if 0 in counts:
        value = route.values[counts.index(0)]
        raise DataError(
            f"no document of {name} that is trained on has {value!r} in `{route.column}`, so the teacher {value!r} "
            f"would teach nothing; remove that teacher, or give other --data"
        )
    return {"routes": dict(zip(route.values, counts, strict=True))}


def check_has_end(corpus: Corpus, tokens: int | None) -> None:
    """Refuse to read a stream whole, where no number of tokens ends it.

    Raises: UsageError.
    """
    if tokens is None and corpus.digest is None:
        raise UsageError(f"{corpus.name} is streamed and may never end; limit it with --tokens")


def tokenize_sample(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, tokens: int | None, rendering: Rendering | None = None
) -> TokenDataset:
    """Enough documents to draw packs of `tokens` tokens from at random (None: all); of a stream at most twice as
    many."""
    minimum = MIN_SAMPLED_TOKENS if isinstance(corpus.documents, Dataset) else 0
    limit = None if tokens is None else max(2 * tokens, minimum)
    return tokenize_corpus(corpus, tokenizer, limit=limit, rendering=rendering)


def pack_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    seed: int,
    tokens: int | None = None,
    rendering: Rendering | None = None,
) -> tuple[Packs, TextReport]:
    """A corpus in packs of `length` tokens: all of it, or as many packs as hold `tokens`; and what is odd about it."""
    token_set = tokenize_sample(corpus, tokenizer, tokens=tokens, rendering=rendering)
    packs = pack(token_set, length=length, seed=seed, bos=get_bos_id(tokenizer))
    report_reading(corpus, packs, token_set.report)
    if tokens is not None:
        packs = packs.take(max(1, int(np.searchsorted(packs.token_offsets, tokens))))
    return packs, token_set.report


def load_held_out_corpus(config: DatasetConfig, *, load: Callable[..., Corpus] = load_mixture) -> Corpus:
    """The text to measure on: `eval_data`, else the validation split of `data`. `load` reads it.

    Of `eval_data`, a file is taken whole, and so is a folder without files named for a split.

    Raises: UsageError where one of both paths contains the other; NotFound, DataError as `load_corpus` does.
    """
    eval_data = config.data if config.eval_data is None else config.eval_data
    paths = {source.name: resolve_path(source.name).resolve() for source in parse_sources(config.data)}
    eval_path = Path() if isinstance(eval_data, tuple) else resolve_path(eval_data).resolve()
    if eval_data == config.data or (eval_path.exists() and list(paths.values()) == [eval_path]):
        return load_data(config, split="validation", label=config.label, load=load)
    for name, path in paths.items():
        if eval_path.exists() and (path == eval_path or path in eval_path.parents or eval_path in path.parents):
            raise UsageError(
                f"--eval-data {config.eval_data} and --data {name} contain one another, so training would "
                f"see what is measured; give two separate paths"
            )
    split = "all" if eval_path.exists() and not has_named_splits(eval_path) else "validation"
    return load_data(replace(config, data=eval_data), split=split, label=config.label, load=load)


def list_held_out_documents(held_out: Corpus) -> Iterable[Mapping[str, Any]]:
    """All documents of a held-out text; of a stream the first, which are those that are measured on."""
    is_stored = isinstance(held_out.documents, Dataset)
    return held_out.documents if is_stored else held_out.documents.take(MAX_STREAMED_DOCUMENTS)


def build_rows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, documents: int, rendering: Rendering | None = None
) -> Sequence[Row]:
    """The first `documents` documents as rows to score: a text, or the answers of a chat with the tokens that end them.

    A chat is written by the tokenizer's own chat template, whose words are not scored. Only the first 2,000 characters
    of a text count, so that a hundred chapters cost little more than a hundred pages.

    Raises: DataError if no document has a token to score.
    """
    if corpus.kind == "text":
        texts = [document["text"][:MAX_MEASURED_CHARACTERS] for document in corpus.documents.take(documents)]
        rows = [row for row in build_text_rows(texts, tokenizer) if row.num_bytes]
    else:
        limited_corpus = replace(corpus, documents=corpus.documents.take(documents))  # of a stream, no more than these
        token_set = tokenize_corpus(limited_corpus, tokenizer, plain=True, rendering=rendering)
        answers = [list_answers(document) for document in limited_corpus.documents]
        labeled_documents = (
            LabeledDocument(tokens.input_ids, tokens.labels, answers[number])
            for tokens, number in zip(token_set, token_set.documents.tolist(), strict=True)
        )
        rows = build_answer_rows(labeled_documents, tokenizer)
    if not rows:
        raise DataError(f"the held-out part of {corpus.name} has no token to score; give --eval-data")
    return rows


def list_answers(document: Mapping[str, Any]) -> list[str | None]:
    """The texts of the assistant's turns; None for a turn that calls tools."""
    turns = (message for message in to_messages(document) if message["role"] == "assistant")
    return [None if turn.get("tool_calls") else turn["content"] for turn in turns]


def describe_answers(options: TextOptions) -> str:
    """What is scored of a chat, behind its name: nothing to say if all answers are."""
    return ", their last answers" if options.train_on == "last" else ""


def compute_measured_digest(corpus: Corpus, *, documents: int, only_last: bool = False) -> str:
    """SHA-256 of the text that `build_rows` scores. It is the same for every tokenizer, file name and split.

    With `only_last`, chats of several answers have another digest, since only their last answers are scored.
    """
    digest = hashlib.sha256()
    for document in corpus.documents.take(documents):
        if corpus.kind == "text":
            text: Any = document["text"][:MAX_MEASURED_CHARACTERS]
        else:
            messages = to_messages(document)
            text = [[message["role"], message["content"]] for message in messages]
            text += ["last"] if only_last and sum(map(is_trained, messages)) > 1 else []
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()


@status("reading the text")
def load_calibration_batches(
    config: DatasetConfig, tokenizer: PreTrainedTokenizerBase, *, tokens: int, batch_tokens: int = 2048
) -> tuple[list[Batch], dict[str, Any]]:
    """About `tokens` tokens of training text in batches of one size, and the facts for the card.

    The tokenizer gets the template of --chat-template.
    """
    prepare_tokenizer(tokenizer, config)
    corpus = load_data(config, label=config.label)
    token_set = tokenize_sample(corpus, tokenizer, tokens=tokens, rendering=make_rendering(config))
    length = min(config.context, batch_tokens)
    packs = pack(token_set, length=length, seed=config.seed, bos=get_bos_id(tokenizer))
    batch_size = max(1, min(tokens, batch_tokens) // length)
    starts = range(0, min(len(packs), max(batch_size, tokens // length)), batch_size)
    batches: list[Batch] = [
        collate([packs[i] for i in range(start, min(start + batch_size, len(packs)))]) for start in starts
    ]
    facts = build_corpus_facts(corpus, packs, token_set.report)
    return batches, {"calibrated_on": facts.pop("trained_on"), **facts}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; a GGUF file is read without its weights."""
    path = locate_model(name)
    return gguf.load_tokenizer(path) if path.is_file() else load_model(path).tokenizer
