"""Tokenizes documents, and labels the tokens that are trained on.

In a text every token is trained on, and the end-of-text token that is appended once. In a pair or a chat only the
assistant's answers are, with their stop tokens. The mask comes from the characters of the rendered chat, never from
ids, so a padding token that equals the stop token does no harm. Without a chat template, a pair is written as prompt,
line break, response, end of text. The template writes all special tokens of a chat, so that no BOS is written twice.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError, UnsupportedModel
from potstill.core.types import IGNORE
from potstill.data.chat_template import ChatTemplate, Message, Span
from potstill.data.corpus import Corpus
from potstill.data.token_dataset import TokenDataset, TokenizedDocument
from potstill.data.turn_starts import find_turn_opener, find_turn_starts
from potstill.data.turns import to_messages

CHUNK = 512  # documents tokenized at once


class RenderedDocument(NamedTuple):
    """A document as the text to tokenize, the spans of characters that are trained on, and its route.

    `turn_starts` are the characters at which the user's turns begin; None for a plain text.
    """

    text: str
    spans: Sequence[Span]
    needs_eos: bool  # whether an end-of-text token follows
    route: int | None = None
    turn_starts: Sequence[int] | None = None


def tokenize_corpus(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, plain: bool = False
) -> TokenDataset:
    """Tokenizes `corpus`, up to the document with which `limit` tokens are reached.

    With `plain`, a tokenizer without a chat template reads chats line by line, as it reads pairs. Documents without a
    token to train on are left out and counted.

    Raises: DataError if no document is left, or if every token of chats or pairs would be trained on; UnsupportedModel
    for a tokenizer that gives no character offsets.
    """
    dropped: Counter[str] = Counter()
    rows = _drop_untrained(_tokenize_documents(corpus, tokenizer, plain=plain), dropped)
    tokens = TokenDataset(rows if limit is None else _take_tokens(rows, limit), dropped)
    if not len(tokens):
        reasons = ", ".join(f"{count} documents with {reason}" for reason, count in dropped.items())
        raise DataError(f"{corpus.name} tokenizes to nothing that could be trained on: {reasons or 'it is empty'}")
    if corpus.kind != "text" and tokens.num_trained == tokens.num_tokens - len(tokens):
        raise DataError(
            f"all {tokens.num_tokens} tokens of {corpus.name} would be trained on, prompts too; correct the chat "
            f"template, which must mark the assistant's answers"
        )
    return tokens


def _drop_untrained(
    rows: Iterable[tuple[int, TokenizedDocument]], dropped: Counter[str]
) -> Iterator[tuple[int, TokenizedDocument]]:
    for number, row in rows:
        if any(label != IGNORE for label in row.labels):
            yield number, row
        else:
            dropped["no token to train on"] += 1


def _take_tokens(rows: Iterable[tuple[int, TokenizedDocument]], limit: int) -> Iterator[tuple[int, TokenizedDocument]]:
    for number, row in rows:
        yield number, row
        limit -= len(row.input_ids)
        if limit <= 0:
            return


def _tokenize_documents(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, plain: bool
) -> Iterator[tuple[int, TokenizedDocument]]:
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} gives no character offsets of its tokens; use a fast tokenizer"
        )
    template = ChatTemplate(tokenizer) if _needs_template(corpus, tokenizer, plain=plain) else None
    opener = "" if template is None else find_turn_opener(template)
    numbered_documents = enumerate(
        _locate_turns(_render_document(document, template, corpus), document, opener)._replace(
            route=document.get("route")
        )
        for document in corpus.documents
    )
    while chunk := list(islice(numbered_documents, CHUNK)):
        yield from _encode_chunk(chunk, tokenizer, add_special_tokens=template is None)


def _needs_template(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> bool:
    """Whether documents are rendered by a chat template. Chats that may not be read `plain` need one."""
    return corpus.kind != "text" and (bool(tokenizer.chat_template) or (corpus.kind == "chat" and not plain))


def _render_document(document: Mapping[str, Any], template: ChatTemplate | None, corpus: Corpus) -> RenderedDocument:
    if template is None:
        return render_plain(document)
    try:
        return render_chat(to_messages(document), template)
    except DataError as error:
        first_words = next((turn["content"][:60] for turn in to_messages(document) if turn["content"].strip()), "")
        raise DataError(f"{corpus.name}, the chat that begins {first_words!r}: {error}") from error


def _locate_turns(rendered: RenderedDocument, document: Mapping[str, Any], opener: str) -> RenderedDocument:
    """`rendered` with the places where the user's turns begin, for a pair or a chat."""
    if "text" in document:
        return rendered
    return rendered._replace(turn_starts=find_turn_starts(rendered.text, to_messages(document), opener))


def render_plain(document: Mapping[str, Any]) -> RenderedDocument:
    """Renders a text as it is, and a pair or a chat as its messages with line breaks between them."""
    if "text" in document:
        return RenderedDocument(document["text"], [(0, len(document["text"]))], document.get("whole", True))
    text, spans = "", []
    for message in to_messages(document):
        text = f"{text}\n" if text else text
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    return RenderedDocument(text, spans, True)


def render_chat(messages: Sequence[Message], template: ChatTemplate) -> RenderedDocument:
    """Renders a chat by its template."""
    text, spans = template.render_with_spans(messages)
    return RenderedDocument(text, spans, False)


def _encode_chunk(
    chunk: Sequence[tuple[int, RenderedDocument]], tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool
) -> Iterator[tuple[int, TokenizedDocument]]:
    texts = [rendered.text for _, rendered in chunk]
    encoding = tokenizer(texts, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
    columns = (encoding["input_ids"], encoding["offset_mapping"])
    for (number, rendered), ids, offsets in zip(chunk, *columns, strict=True):
        row = label_tokens(
            ids, compute_label_mask(rendered.spans, offsets), tokenizer.eos_token_id if rendered.needs_eos else None
        )
        if rendered.turn_starts is not None:
            starts = np.searchsorted([start for start, _ in offsets], rendered.turn_starts)
            row = row._replace(turn_starts=tuple(starts.tolist()))
        yield number, row if rendered.route is None else row._replace(fields={"routes": rendered.route})


def label_tokens(ids: Sequence[int], label_mask: Sequence[bool], eos: int | None) -> TokenizedDocument:
    """Tokens with their labels, and `eos` after them; it is not repeated if the tokenizer has appended it."""
    ids, labels = list(ids), [i if is_trained else IGNORE for i, is_trained in zip(ids, label_mask, strict=True)]
    if eos is not None and ids:
        has_eos = ids[-1] == eos
        ids, labels = (ids[:-1], labels[:-1]) if has_eos else (ids, labels)
        ids, labels = [*ids, eos], [*labels, eos]
    return TokenizedDocument(ids, [IGNORE, *labels[1:]] if ids else [])


def compute_label_mask(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """Whether each token, given by its offsets, lies completely within one of the spans. Both ascend.

    A token that starts before a span and ends in it is not trained on: at inference the prompt ends there, so no model
    could generate it. A byte-level tokenizer may trim spaces from offsets, which leaves a lone space empty at its end.
    """
    mask, index = [], 0
    for start, stop in offsets:
        while index < len(spans) and spans[index][1] <= start and spans[index][1] < stop:
            index += 1
        mask.append(index < len(spans) and spans[index][0] <= start and spans[index][0] < stop <= spans[index][1])
    return mask
