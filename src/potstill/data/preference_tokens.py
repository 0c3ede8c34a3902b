"""Tokenizes preferences into groups of documents that share a prompt.

The whole chat of each side is rendered and tokenized at once, as `data.tokenize` does it. Its last answer is trained
on, with the end token. What the sides of a group begin with, token by token, is their prompt (`data.shared_prompts`). A
group that is longer than a pack is left out and counted, never cut.

KTO (Ethayarajh et al., 2024, arXiv:2402.01306, section 4.1) compares each answer with a baseline: its prompt with the
answer to another one. Here that is the next answer of the same split to another prompt, never the answer itself. A
group holds several answers with their baselines, since the mean over these estimates a divergence.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.core.screen import status
from potstill.core.types import BASELINE, CHOSEN, IGNORE, REJECTED
from potstill.data.corpus import Corpus
from potstill.data.pack_fields import GROUPS, LABEL_FIELDS
from potstill.data.preference_sides import EMPTY_ANSWER, EQUAL_SIDES
from potstill.data.schema import Document
from potstill.data.shared_prompts import build_group
from potstill.data.split import hash_content
from potstill.data.token_dataset import TextReport, TokenDataset, TokenizedDocument
from potstill.data.tokenize import DocumentRenderer, RenderedDocument, Rendering, tokenize_chunk
from potstill.data.windows import COVERED_PERCENTILE

CHUNK = 256  # groups tokenized at once
ANSWERS_PER_GROUP = 4  # with labels: fewer baselines estimate the divergence badly
TOO_LONG = "more tokens than the context"  # why a group is left out
SIDES = {"chosen": CHOSEN, "rejected": REJECTED}
GroupKind = Literal["preferences", "labels", "chosen"]


class ChatGroup(NamedTuple):
    """Whole chats that belong together, the side of each, and the number of the first one's row in the corpus."""

    number: int
    chats: tuple[Document, ...]
    sides: tuple[int, ...]


@dataclass(frozen=True)
class PreferenceCounts:
    """How many pairs or answers with labels there are, the `groups`, and how long answers are, in trained tokens.

    `chosen` and `rejected` are the numbers of answers on each side, `chosen_tokens` and `rejected_tokens` their mean
    lengths. `shorter_is_chosen` is the share of the pairs of different lengths whose shorter answer is chosen, None
    without such pairs. Far from a half, a loss may learn the length alone. `covering` is the context that holds 99 % of
    the groups whole. `left_out` counts the rows that are not trained on, by reason.
    """

    groups: int
    chosen: int
    rejected: int
    chosen_tokens: float
    rejected_tokens: float
    shorter_is_chosen: float | None
    covering: int
    left_out: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The counts for a card."""
        return {
            "groups": self.groups,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "chosen_tokens": round(self.chosen_tokens, 1),
            "rejected_tokens": round(self.rejected_tokens, 1),
            "shorter_is_chosen": None if self.shorter_is_chosen is None else round(self.shorter_is_chosen, 3),
            "covering": self.covering,
            "left_out": dict(self.left_out),
        }


class TokenizedPreferences(NamedTuple):
    """The documents of all groups, in the order of the corpus, and their counts."""

    tokens: TokenDataset
    counts: PreferenceCounts


@status("tokenizing")
def tokenize_preferences(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: GroupKind = "preferences",
    rendering: Rendering | None = None,
    length: int | None = None,
    limit: int | None = None,
    shared: bool = True,
) -> TokenizedPreferences:
    """Tokenizes preferences, at most `limit` groups, into groups of at most `length` tokens.

    `data` says what a group is: for `preferences` the two answers of a pair, for `labels` an answer and its baseline
    (KTO), where each side of a pair is an answer too, for `chosen` the chosen answer of a pair alone. Without `shared`,
    each side repeats the prompt.

    Raises: DataError if no group is left, for answers with labels where pairs are needed, or where an answer has no
    baseline; UnsupportedModel for a tokenizer that gives no character offsets.
    """
    groups = LISTS[data](corpus)
    tokenized = tokenize_groups(
        corpus, islice(groups, limit), tokenizer, rendering=rendering, length=length, shared=shared
    )
    if not tokenized.counts.groups:
        raise DataError(describe_empty_data(corpus, tokenized, length))
    return tokenized


def tokenize_groups(
    corpus: Corpus,
    groups: Iterable[ChatGroup],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rendering: Rendering | None = None,
    length: int | None = None,
    shared: bool = True,
) -> TokenizedPreferences:
    """Tokenizes groups of chats, and leaves out those that are empty, equal or longer than `length` tokens.

    Raises: UnsupportedModel for a tokenizer that gives no character offsets; DataError for a chat that is refused.
    """
    report = TextReport()
    renderer = DocumentRenderer(corpus, tokenizer, replace(rendering or Rendering(), only_last=True), report)
    builder = _GroupBuilder(length, shared, report.drop_counts)
    documents = builder.build(groups, renderer)
    tokens = TokenDataset(documents, report)
    left_out = Counter(corpus.drop_counts) + report.drop_counts
    return TokenizedPreferences(tokens, builder.count(left_out))


class _GroupBuilder:
    """Builds the documents of groups, and counts the lengths of their answers."""

    def __init__(self, length: int | None, shared: bool, drop_counts: Counter[str]) -> None:
        self.length, self.shared, self.drop_counts = length, shared, drop_counts
        self.num_groups = 0
        self.number = -1  # of the last group of documents, its answers with labels, and its tokens
        self.num_answers = self.num_tokens = 0
        self.sizes: list[int] = []  # tokens of each group, also of those that are left out for it
        self.answer_lengths: list[tuple[int, int]] = []  # (side, trained tokens)
        self.differences: list[int] = []  # trained tokens of the rejected side less those of the chosen one

    def build(self, groups: Iterable[ChatGroup], renderer: DocumentRenderer) -> Iterator[tuple[int, TokenizedDocument]]:
        """The documents of all groups that are kept, each with the number of its row."""
        groups = iter(groups)
        while chunk := list(islice(groups, CHUNK)):
            rendered = [(group, texts) for group in chunk if (texts := _render_group(group, renderer))]
            numbered_texts = [(group.number, text) for group, texts in rendered for text in texts]
            documents = iter(tokenize_chunk(numbered_texts, renderer))
            for group, texts in rendered:
                sides = [document for _, document in islice(documents, len(texts))]
                yield from ((group.number, document) for document in self._build_group(group, sides))

    def _build_group(self, group: ChatGroup, documents: Sequence[TokenizedDocument]) -> list[TokenizedDocument]:
        sizes = [sum(label != IGNORE for label in document.labels) for document in documents]
        built = build_group(documents, group.sides, group=0, shared=self.shared)
        num_tokens = sum(len(document.input_ids) for document in built)
        if reason := self._find_drop_reason(documents, sizes, num_tokens):
            self.drop_counts[reason] += 1
            self.sizes += [num_tokens] if reason == TOO_LONG else []
            return []
        self.num_groups += 1
        self.sizes.append(num_tokens)
        self.answer_lengths += [pair for pair in zip(group.sides, sizes, strict=True) if pair[0] != BASELINE]
        self.differences += [sizes[1] - sizes[0]] if group.sides == (CHOSEN, REJECTED) else []
        number = self._choose_number(BASELINE in group.sides, num_tokens)
        return [document._replace(fields={**document.fields, GROUPS.name: number}) for document in built]

    def _choose_number(self, has_baseline: bool, num_tokens: int) -> int:
        """A new number, or for an answer with a baseline that of the answers before it, if half a pack holds them."""
        continues_group = has_baseline and 0 < self.num_answers < ANSWERS_PER_GROUP
        continues_group &= self.length is None or self.num_tokens + num_tokens <= self.length // 2
        self.number += not continues_group
        self.num_answers = (self.num_answers if continues_group else 0) + has_baseline
        self.num_tokens = (self.num_tokens if continues_group else 0) + num_tokens
        return self.number

    def _find_drop_reason(
        self, documents: Sequence[TokenizedDocument], sizes: Sequence[int], num_tokens: int
    ) -> str | None:
        if not all(sizes):
            return EMPTY_ANSWER
        if len(documents) > 1 and documents[0].input_ids == documents[1].input_ids:
            return EQUAL_SIDES
        return TOO_LONG if self.length is not None and num_tokens > self.length else None

    def count(self, left_out: Mapping[str, int]) -> PreferenceCounts:
        """The counts of all groups that were built."""
        chosen, rejected = ([size for s, size in self.answer_lengths if s == side] for side in (CHOSEN, REJECTED))
        decisive = [difference > 0 for difference in self.differences if difference]
        return PreferenceCounts(
            groups=self.num_groups,
            chosen=len(chosen),
            rejected=len(rejected),
            chosen_tokens=float(np.mean(chosen)) if chosen else 0.0,
            rejected_tokens=float(np.mean(rejected)) if rejected else 0.0,
            shorter_is_chosen=float(np.mean(decisive)) if decisive else None,
            covering=int(np.percentile(self.sizes, COVERED_PERCENTILE, method="higher")) if self.sizes else 0,
            left_out={reason: count for reason, count in left_out.items() if count},
        )


def _render_group(group: ChatGroup, renderer: DocumentRenderer) -> list[RenderedDocument]:
    """The text of each chat of a group; none if one of them is left out."""
    texts: list[RenderedDocument] = []
    for chat in group.chats:
        rendered = renderer.render(chat)
        if not rendered:
            return []
        texts += rendered
    return texts


def list_pairs(corpus: Corpus) -> Iterator[ChatGroup]:
    """The two sides of each pair.

    Raises: DataError for an answer with a label.
    """
    for number, document in enumerate(corpus.documents):
        if document["label"] is not None:
            raise DataError(
                f"{corpus.name} holds answers with labels and no pairs; train on them with --objective kto, or give "
                f"rows with chosen and rejected"
            )
        yield list_sides(number, document)


def list_chosen(corpus: Corpus) -> Iterator[ChatGroup]:
    """The chosen side of each pair. Raises: DataError for an answer with a label."""
    return (ChatGroup(group.number, group.chats[:1], group.sides[:1]) for group in list_pairs(corpus))


def list_sides(number: int, document: Document) -> ChatGroup:
    """The sides of a row that have an answer: two of a pair, one of an answer with a label."""
    names = [name for name in SIDES if document[name]]
    return ChatGroup(
        number,
        tuple(_build_chat(document, document[name]) for name in names),
        tuple(SIDES[name] for name in names),
    )


def _build_chat(document: Document, answer: Sequence[Mapping[str, Any]]) -> Document:
    labels = {key: document[key] for key in LABEL_FIELDS if key in document}
    return {"messages": [*document["prompt"], *answer], "tools": document["tools"], **labels}


def list_labeled_answers(corpus: Corpus) -> Iterator[ChatGroup]:
    """Each answer with its baseline: the same prompt with the next answer to another prompt.

    Raises: DataError if an answer has no baseline.
    """
    answers = [
        (number, name, hash_content(document), hash_content({"messages": document[name][-1:]}))
        for number, document in enumerate(corpus.documents)
        for name in SIDES
        if document[name]
    ]
    for i, (number, name, prompt, answer) in enumerate(answers):
        candidates = (answers[(i + step) % len(answers)] for step in range(1, len(answers)))
        baseline = next((item for item in candidates if item[2] != prompt and item[3] != answer), None)
        if baseline is None:
            raise DataError(
                f"KTO compares each answer with one to another prompt, and among the {len(answers)} answers of "
                f"{corpus.name} ({corpus.provenance.get('split', 'all')}) one has none; give rows of more prompts"
            )
        document = corpus.documents[number]
        side, mismatched_answer = document[name], corpus.documents[baseline[0]][baseline[1]][-1:]
        chats = (_build_chat(document, side), _build_chat(document, [*side[:-1], *mismatched_answer]))
        yield ChatGroup(number, chats, (SIDES[name], BASELINE))


def describe_left_out(counts: PreferenceCounts) -> str:
    """The rows that are left out, by reason."""
    return ", ".join(f"{count:,} with {reason}" for reason, count in counts.left_out.items()) or "nothing"


def describe_empty_data(corpus: Corpus, tokenized: TokenizedPreferences, length: int | None) -> str:
    """Why no group of a corpus is left, as one sentence."""
    counts = tokenized.counts
    remedy = f"; --context {counts.covering} holds {COVERED_PERCENTILE} % of them, and --context {length} none"
    remedy = remedy if TOO_LONG in counts.left_out else ""
    examples = "".join(f"; {row}" for row in (*corpus.bad_rows, *tokenized.tokens.report.bad_rows))
    return f"no preference of {corpus.name} can be trained on, {describe_left_out(counts)}{remedy}{examples}"


LISTS: Mapping[GroupKind, Callable[[Corpus], Iterator[ChatGroup]]] = {
    "preferences": list_pairs,
    "labels": list_labeled_answers,
    "chosen": list_chosen,
}
