"""Tokenizes documents, and labels the tokens that are trained on.

In a text every token is trained on, and the end-of-text token that is appended once. In a pair or a chat only the
assistant's answers are, with their end tokens. The mask comes from the characters of the rendered chat, never from
ids, so a padding token that equals the stop token does no harm. Without a chat template, a pair is written as prompt,
line break, response, end of text. The template writes all special tokens of a chat, so that no BOS is written twice.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError, UnsupportedModel
from potstill.core.screen import status
from potstill.core.types import IGNORE
from potstill.data.chat_template import ChatTemplate, count_lost_thinking
from potstill.data.control_tokens import ControlTokenPolicy, ControlTokens
from potstill.data.corpus import Corpus
from potstill.data.pack_fields import LABEL_FIELDS
from potstill.data.row_reader import MAX_EXAMPLES, BadRowPolicy
from potstill.data.token_dataset import TextReport, TokenDataset, TokenizedDocument
from potstill.data.turn_starts import find_turn_opener, find_turn_starts
from potstill.data.turns import get_tools, is_trained, to_messages
from potstill.models.tokenizers.chat_renderer import Span

CHUNK = 512  # documents tokenized at once
TEMPLATE_REFUSAL = "a chat that the template refuses"


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How documents become text.

    `only_last` trains the last answer of a chat alone. `special_in_text` says what control tokens in the data's own
    text are: `keep` them, `escape` them to plain text, or `refuse` the document. `on_bad_row` says whether a document
    that cannot be rendered is refused, or left out and counted.
    """

    only_last: bool = False
    special_in_text: ControlTokenPolicy = "keep"
    on_bad_row: BadRowPolicy = "refuse"


class RenderedDocument(NamedTuple):
    """A document as the text to tokenize, the spans of characters that are trained on, and its labels.

    `turn_starts` are the characters at which the user's turns begin; None for a plain text.
    The control tokens of an escaped text are exchanged for placeholders (`data.control_tokens`).
    """

    text: str
    spans: Sequence[Span]
    needs_eos: bool  # whether an end-of-text token follows
    labels: Mapping[str, int] = MappingProxyType({})  # the number of each field of `pack_fields.LABEL_FIELDS`
    turn_starts: Sequence[int] | None = None
    is_escaped: bool = False


@status("tokenizing")
def tokenize_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    plain: bool = False,
    rendering: Rendering | None = None,
) -> TokenDataset:
    """Tokenizes `corpus`, up to the document with which `limit` tokens are reached.

    With `plain`, a tokenizer without a chat template reads chats line by line, as it reads pairs. Documents without a
    token to train on are left out and counted.

    Raises: DataError if no document is left, or if every token of chats or pairs would be trained on; UnsupportedModel
    for a tokenizer that gives no character offsets.
    """
    report = TextReport()
    renderer = DocumentRenderer(corpus, tokenizer, rendering or Rendering(), report, plain=plain)
    rows = _drop_untrained(_tokenize_documents(corpus, renderer), report.drop_counts)
    tokens = TokenDataset(rows if limit is None else _take_tokens(rows, limit), report)
    if not len(tokens):
        reasons = ", ".join(f"{count} documents with {reason}" for reason, count in report.drop_counts.items())
        examples = "".join(f"; {row}" for row in report.bad_rows)
        raise DataError(
            f"{corpus.name} tokenizes to nothing that could be trained on: {reasons or 'it is empty'}{examples}"
        )
    if corpus.kind != "text" and tokens.num_trained == tokens.num_tokens - len(tokens):
        raise DataError(
            f"all {tokens.num_tokens} tokens of {corpus.name} would be trained on, prompts too; correct the chat "
            f"template, which must mark the assistant's answers"
        )
    return tokens


def _drop_untrained(
    rows: Iterable[tuple[int, TokenizedDocument]], drop_counts: Counter[str]
) -> Iterator[tuple[int, TokenizedDocument]]:
    for number, row in rows:
        if any(label != IGNORE for label in row.labels):
            yield number, row
        else:
            drop_counts["no token to train on"] += 1


def _take_tokens(rows: Iterable[tuple[int, TokenizedDocument]], limit: int) -> Iterator[tuple[int, TokenizedDocument]]:
    for number, row in rows:
        yield number, row
        limit -= len(row.input_ids)
        if limit <= 0:
            return


class DocumentRenderer:
    """Renders the documents of a corpus by a tokenizer's template, or line by line, and counts what is odd.

    Raises: DataError for chats without a template; UnsupportedModel for a tokenizer without character offsets.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        rendering: Rendering,
        report: TextReport,
        *,
        plain: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} gives no character offsets of its tokens; use a fast tokenizer"
            )
        self.corpus, self.tokenizer, self.rendering, self.report = corpus, tokenizer, rendering, report
        has_template = corpus.kind != "text" and (
            bool(tokenizer.chat_template) or (corpus.kind == "chat" and not plain)
        )
        self.template = ChatTemplate(tokenizer) if has_template else None
        self._turn_opener = "" if self.template is None else find_turn_opener(self.template)
        self.control_tokens = ControlTokens(tokenizer)

    def render(self, document: Mapping[str, Any]) -> list[RenderedDocument]:
        """The texts in which a document is trained; none if it is left out.

        Raises: DataError for a document that is refused.
        """
        try:
            rendered = self._render(document)
        except DataError as error:
            messages = [] if "text" in document else to_messages(document)
            first_words = next((turn["content"][:60] for turn in messages if turn["content"].strip()), "")
            description = f"{self.corpus.name}, the chat that begins {first_words!r}: {error}"
            if self.rendering.on_bad_row == "refuse":
                raise DataError(description) from error
            self.report.drop_counts[TEMPLATE_REFUSAL] += 1
            self.report.bad_rows += [description] if len(self.report.bad_rows) < MAX_EXAMPLES else []
            return []
        self.report.num_own_texts += max(0, len(rendered) - 1)
        labels = {field: document[key] for key, field in LABEL_FIELDS.items() if key in document}
        return [text._replace(labels=labels) for text in rendered]

    def _render(self, document: Mapping[str, Any]) -> list[RenderedDocument]:
        messages = [{"role": "", "content": document["text"]}] if "text" in document else to_messages(document)
        policy = self.rendering.special_in_text
        masked, count = self.control_tokens.mask_messages(messages, policy)
        self.report.num_control_tokens += count
        self.report.num_control_documents += bool(count)
        if not count or policy == "keep":
            return self._render_messages(document, messages)
        masked_document = {**document, "text": masked[0]["content"]} if "text" in document else document
        rendered = self._render_messages(masked_document, masked)
        return [text._replace(text=self.control_tokens.exchange(text.text), is_escaped=True) for text in rendered]

    def _render_messages(
        self, document: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
    ) -> list[RenderedDocument]:
        if "text" in document:
            return [render_text(document)]
        if self.template is None:
            return [self._locate_turns(render_lines(messages, only_last=self.rendering.only_last), messages)]
        texts = self.template.render_answers(messages, tools=get_tools(document), only_last=self.rendering.only_last)
        self.report.num_lost_thoughts += count_lost_thinking(messages, texts)
        return [self._locate_turns(RenderedDocument(text, spans, False), messages) for text, spans in texts]

    def _locate_turns(self, rendered: RenderedDocument, messages: Sequence[Mapping[str, Any]]) -> RenderedDocument:
        """`rendered` with the places where the user's turns begin."""
        return rendered._replace(turn_starts=find_turn_starts(rendered.text, messages, self._turn_opener))

    def encode(self, texts: Sequence[RenderedDocument]) -> Iterator[tuple[Sequence[int], Sequence[Span]]]:
        """The ids and offsets of each text."""
        add_special_tokens = self.template is None
        plain_texts = [rendered.text for rendered in texts if not rendered.is_escaped]
        encoding: Iterator[tuple[Sequence[int], Sequence[Span]]] = iter(())
        if plain_texts:
            columns = self.tokenizer(
                plain_texts, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
            )
            encoding = zip(columns["input_ids"], columns["offset_mapping"], strict=True)
        for rendered in texts:
            ids, offsets = (
                self.control_tokens.encode(rendered.text, add_special_tokens=add_special_tokens)
                if rendered.is_escaped
                else next(encoding)
            )
            yield ids, self._clip_offsets(rendered.text, ids, offsets)

    def _clip_offsets(self, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> Sequence[Span]:
        """The offsets without the spaces that a special token with `lstrip` or `rstrip` takes in, as Phi-3's do."""
        if not self._stripping_tokens:
            return offsets
        return [self._clip_offset(text, i, span) for i, span in zip(ids, offsets, strict=True)]

    def _clip_offset(self, text: str, token: int, span: Span) -> Span:
        start, stop = span
        if token not in self._stripping_tokens or stop <= start:
            return span
        piece = text[start:stop]
        return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())

    @cached_property
    def _stripping_tokens(self) -> frozenset[int]:
        added_tokens = self.tokenizer.added_tokens_decoder.items()
        return frozenset(i for i, token in added_tokens if token.content.strip() and (token.lstrip or token.rstrip))


def _tokenize_documents(corpus: Corpus, renderer: DocumentRenderer) -> Iterator[tuple[int, TokenizedDocument]]:
    numbered_texts = (
        (number, rendered) for number, document in enumerate(corpus.documents) for rendered in renderer.render(document)
    )
    while chunk := list(islice(numbered_texts, CHUNK)):
        yield from tokenize_chunk(chunk, renderer)


def render_text(document: Mapping[str, Any]) -> RenderedDocument:
    """Renders a text as it is."""
    return RenderedDocument(document["text"], [(0, len(document["text"]))], document.get("whole", True))


def render_lines(messages: Sequence[Mapping[str, Any]], *, only_last: bool = False) -> RenderedDocument:
    """Renders a pair or a chat as its messages with line breaks between them."""
    text, spans = "", []
    for message in messages:
        text = f"{text}\n" if text else text
        if is_trained(message):
            spans.append((len(text), len(text) + len(message["content"])))
        text += message["content"]
    return RenderedDocument(text, spans[-1:] if only_last else spans, True)


def tokenize_chunk(
    chunk: Sequence[tuple[int, RenderedDocument]], renderer: DocumentRenderer
) -> Iterator[tuple[int, TokenizedDocument]]:
    """The tokens and labels of rendered documents, each with its number."""
    texts = [rendered for _, rendered in chunk]
    for (number, rendered), (ids, offsets) in zip(chunk, renderer.encode(texts), strict=True):
        eos = renderer.tokenizer.eos_token_id if rendered.needs_eos else None
        row = label_tokens(ids, compute_label_mask(rendered.spans, offsets), eos)
        if rendered.turn_starts is not None:
            starts = np.searchsorted([start for start, _ in offsets], rendered.turn_starts)
            row = row._replace(turn_starts=tuple(starts.tolist()))
        yield number, row._replace(fields=rendered.labels) if rendered.labels else row


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
