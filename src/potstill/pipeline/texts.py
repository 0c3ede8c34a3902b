"""Text for a stage: a corpus by name, read by a tokenizer, packed for training and kept in rows for measuring."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from potstill.core.errors import DataError, UsageError
from potstill.core.types import Batch
from potstill.data.chat import tokenise
from potstill.data.corpus import Corpus, load_corpus
from potstill.data.pack import Packs, collate, pack
from potstill.evaluate.perplexity import bos_of, supervised_rows, text_rows
from potstill.evaluate.reading import Row, context_of


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text, in windows of which length. Without `eval_data` the corpus' own validation split is held out."""

    data: str
    eval_data: str | None = None
    context: int = 512
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Packs to train on, packs and rows to measure on, a digest of both, and what a card says of them."""

    packs: Packs
    validation_packs: Packs
    rows: Sequence[Row]
    digest: str
    facts: Mapping[str, Any]


def prepare(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    models: Sequence[PreTrainedModel] = (),
    documents: int = 100,
) -> Prepared:
    """Everything that a training stage reads.

    Raises:
        DataError, NotFound: as `load_corpus` and `tokenise` do.
        UsageError: a context longer than one of `models` can take in.
    """
    for model in models:
        if text.context > context_of(model):
            raise UsageError(
                f"--context {text.context} is longer than the {context_of(model)} tokens that "
                f"{type(model).__name__} was made for; ask for less"
            )
    corpus = load_corpus(text.data)
    read = tokenise(corpus, tokenizer, limit=2 * tokens)
    packs = pack(read, length=text.context, seed=text.seed, bos=bos_of(tokenizer))
    held_out = held_out_corpus(text)
    validation = pack(
        tokenise(held_out, tokenizer, limit=50_000), length=text.context, seed=text.seed, bos=bos_of(tokenizer)
    )
    facts = {
        "trained_on": corpus.name,
        "licence": corpus.licence,
        "documents": len(read),
        "tokens": packs.tokens,
        "trained_share": packs.trained / packs.tokens,
        "fill": packs.fill,
        "text_digest": corpus.digest,
        "measured_on": f"{held_out.name}, {held_out.provenance.get('split', 'validation')}, {documents} documents",
        "provenance": dict(corpus.provenance),
    }
    rows = rows_of(held_out, tokenizer, documents=documents)
    return Prepared(packs=packs, validation_packs=validation, rows=rows, digest=packs.digest, facts=facts)


def held_out_corpus(text: Text) -> Corpus:
    """The text that is measured on: `eval_data`, or the validation split of `data`."""
    return load_corpus(text.data if text.eval_data is None else text.eval_data, split="validation")


def rows_of(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, documents: int) -> Sequence[Row]:
    """The first `documents` documents as rows to score: whole texts, or what the assistant says in chats.

    Raises: DataError if none of them has a token to score.
    """
    if corpus.kind == "text":
        texts = [one["text"] for one in corpus.documents.take(documents)]
        rows = [row for row in text_rows(texts, tokenizer) if row.size]
    else:
        rows = list(supervised_rows(tokenise(corpus, tokenizer)[:documents], tokenizer))
    if not rows:
        raise DataError(f"the held-out part of {corpus.name} has no token to score; give --eval-data")
    return rows


def calibration(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, tokens: int, batch_tokens: int = 2048
) -> list[Batch]:
    """Some `tokens` of training text as batches of one size, for measuring importance."""
    read = tokenise(load_corpus(text.data), tokenizer, limit=4 * tokens)
    length = min(text.context, batch_tokens)
    packs = pack(read, length=length, seed=text.seed, bos=bos_of(tokenizer))
    each = max(1, batch_tokens // length)
    starts = range(0, min(len(packs), max(each, tokens // length)), each)
    return [collate([packs[i] for i in range(start, min(start + each, len(packs)))]) for start in starts]
