"""Documents as tokens, with a label where a token is trained on.

Of a text every token is trained on, and the end of text that is put behind it once. Of a pair or a chat only what the
assistant says, its stop token included, whatever the padding token is (masks come from the template's text, never from
ids). A pair for a tokenizer without a chat template is written plainly: prompt, line break, response, end of text.
The template owns the special tokens of a chat, so that no BOS is written twice.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError, UnsupportedModel
from potstill.core.types import IGNORE
from potstill.data.corpus import Corpus
from potstill.data.template import ChatTemplate, Message, Span
from potstill.data.tokens import Tokenised, TokenSet

CHUNK = 512  # documents tokenised at once


class Drawn(NamedTuple):
    """A document as the text that is tokenised, the spans of its characters that are trained on, and its route."""

    text: str
    spans: Sequence[Span]
    ends: bool  # whether an end of text belongs behind it
    route: int | None = None


def tokenise(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None, plain: bool = False
) -> TokenSet:
    """`corpus` as tokens, up to the document with which `limit` tokens are reached.

    With `plain`, a tokenizer without a chat template reads chats line by line, as it reads pairs.

    Rows without a token to train on are left out and counted.
    Raises: DataError if nothing is left, or if of a chat set every token would be trained on; UnsupportedModel for a
    tokenizer that cannot say where its tokens lie in the text.
    """
    dropped: Counter[str] = Counter()
    rows = _kept(_rows(corpus, tokenizer, plain=plain), dropped)
    tokens = TokenSet(rows if limit is None else _until(rows, limit), dropped)
    if not len(tokens):
        left_out = ", ".join(f"{count} documents with {reason}" for reason, count in dropped.items())
        raise DataError(f"{corpus.name} tokenises to nothing that could be trained on: {left_out or 'it is empty'}")
    if corpus.kind != "text" and tokens.trained == tokens.tokens - len(tokens):
        raise DataError(
            f"all {tokens.tokens} tokens of {corpus.name} would be trained on, prompts too; mend the chat template, "
            f"which has to mark what the assistant says"
        )
    return tokens


def _kept(rows: Iterable[tuple[int, Tokenised]], dropped: Counter[str]) -> Iterator[tuple[int, Tokenised]]:
    for number, row in rows:
        if any(label != IGNORE for label in row.labels):
            yield number, row
        else:
            dropped["no token to train on"] += 1


def _until(rows: Iterable[tuple[int, Tokenised]], limit: int) -> Iterator[tuple[int, Tokenised]]:
    for number, row in rows:
        yield number, row
        limit -= len(row.input_ids)
        if limit <= 0:
            return


def _rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> Iterator[tuple[int, Tokenised]]:
    if not tokenizer.is_fast:
        raise UnsupportedModel(f"{type(tokenizer).__name__} does not say where its tokens lie; use a fast tokenizer")
    template = ChatTemplate(tokenizer) if _templated(corpus, tokenizer, plain=plain) else None
    drawn = enumerate(
        _drawn(document, template, corpus)._replace(route=document.get("route")) for document in corpus.documents
    )
    while chunk := list(islice(drawn, CHUNK)):
        yield from _encoded(chunk, tokenizer, specials=template is None)


def _templated(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, plain: bool) -> bool:
    """Whether a template is used, or, for chats that may not be read `plain`, is missing and to be asked for."""
    return corpus.kind != "text" and (bool(tokenizer.chat_template) or (corpus.kind == "chat" and not plain))


def _drawn(document: Mapping[str, Any], template: ChatTemplate | None, corpus: Corpus) -> Drawn:
    if template is None:
        return draw(document)
    try:
        return draw_chat(as_messages(document), template)
    except DataError as error:
        opening = next((turn["content"][:60] for turn in as_messages(document) if turn["content"].strip()), "")
        raise DataError(f"{corpus.name}, the chat that begins {opening!r}: {error}") from error


def as_messages(document: Mapping[str, Any]) -> list[Message]:
    """A chat's messages, or a pair as the two messages of a chat."""
    if "messages" in document:
        return list(document["messages"])
    return [
        {"role": "user", "content": document["prompt"]},
        {"role": "assistant", "content": document["response"]},
    ]


def draw(document: Mapping[str, Any]) -> Drawn:
    """A text, or a pair or a chat without a template: prompt, line break, response."""
    if "text" in document:
        return Drawn(document["text"], [(0, len(document["text"]))], document.get("whole", True))
    text, spans = "", []
    for message in as_messages(document):
        text = f"{text}\n" if text else text
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    return Drawn(text, spans, True)


def draw_chat(messages: Sequence[Message], template: ChatTemplate) -> Drawn:
    """A chat as its template writes it."""
    text, spans = template.spoken(messages)
    return Drawn(text, spans, False)


def _encoded(
    chunk: Sequence[tuple[int, Drawn]], tokenizer: PreTrainedTokenizerBase, *, specials: bool
) -> Iterator[tuple[int, Tokenised]]:
    texts = [drawn.text for _, drawn in chunk]
    encoded = tokenizer(texts, add_special_tokens=specials, return_offsets_mapping=True, verbose=False)
    columns = (encoded["input_ids"], encoded["offset_mapping"])
    for (number, drawn), ids, offsets in zip(chunk, *columns, strict=True):
        row = labelled(ids, within(drawn.spans, offsets), tokenizer.eos_token_id if drawn.ends else None)
        yield number, row._replace(route=drawn.route)


def labelled(ids: Sequence[int], trained: Sequence[bool], end: int | None) -> Tokenised:
    """Tokens with their labels, and `end`, the end of text, behind them, once: the tokenizer may have put one there."""
    ids, labels = list(ids), [i if on else IGNORE for i, on in zip(ids, trained, strict=True)]
    if end is not None and ids:
        repeated = ids[-1] == end
        ids, labels = (ids[:-1], labels[:-1]) if repeated else (ids, labels)
        ids, labels = [*ids, end], [*labels, end]
    return Tokenised(ids, [IGNORE, *labels[1:]] if ids else [])


def within(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """For each token, given by its offsets, whether it lies wholly within one of the spans; both in ascending order.

    A token that reaches into a span from before it is no part of it: at inference the prompt ends there, and no such
    token could be written. A byte-level tokenizer may trim spaces from offsets, to nothing at the end of a lone space.
    """
    inside, place = [], 0
    for start, stop in offsets:
        while place < len(spans) and spans[place][1] <= start and spans[place][1] < stop:
            place += 1
        inside.append(place < len(spans) and spans[place][0] <= start and spans[place][0] < stop <= spans[place][1])
    return inside
