"""Tokenized documents in memory, at eight bytes a token."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Int32

from potstill.core.counts import count_noun
from potstill.core.types import IGNORE
from potstill.data.pack_fields import get_field, join_fields, slice_fields, to_array


class TokenizedDocument(NamedTuple):
    """A document as tokens. `labels` hold `input_ids` where a token is trained on, else IGNORE; the first is IGNORE.

    `fields` holds values that are declared per token or per document (`data.pack_fields`): a list of one value per
    token, or one number. `turn_starts` are the positions at which the words of the user's turns begin; before the first
    stand the system prompt and the template's opening. It is None for a plain text. Windows of a chat follow it
    (`data.windows`).
    """

    input_ids: list[int]
    labels: list[int]
    fields: Mapping[str, Any] = {}
    turn_starts: tuple[int, ...] | None = None


@dataclass
class TextReport:
    """What is odd about the documents of a corpus, counted while they are rendered.

    `drop_counts` are the documents that were left out, by reason; `bad_rows` describes the first that the template
    refuses. `num_own_texts` counts the answers that are trained in a text of their own, since the template changes them
    once other turns follow. `num_lost_thoughts` counts the answers whose thinking the template leaves out.
    """

    drop_counts: Counter[str] = field(default_factory=Counter)
    bad_rows: list[str] = field(default_factory=list)
    num_control_tokens: int = 0
    num_control_documents: int = 0
    num_own_texts: int = 0
    num_lost_thoughts: int = 0

    def describe(self) -> list[str]:
        """A sentence for each count that is not zero."""
        sentences = []
        if self.num_control_tokens:
            sentences.append(
                f"the text of {count_noun(self.num_control_documents, 'document')} contains "
                f"{count_noun(self.num_control_tokens, 'control token')} of the tokenizer; --special-in-text says "
                f"whether to keep, escape or refuse them"
            )
        if self.num_lost_thoughts:
            answers = count_noun(self.num_lost_thoughts, "answer")
            sentences.append(f"the chat template leaves out the thinking of {answers}")
        if self.num_own_texts:
            verb = "is" if self.num_own_texts == 1 else "are"
            sentences.append(
                f"{count_noun(self.num_own_texts, 'answer')} {verb} trained in a text of their own, since the chat "
                f"template changes them once other turns follow"
            )
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """The counts that are not zero, for a card."""
        counts = {
            "control_tokens_in_text": self.num_control_tokens,
            "documents_with_control_tokens": self.num_control_documents,
            "answers_in_texts_of_their_own": self.num_own_texts,
            "answers_without_their_thinking": self.num_lost_thoughts,
        }
        return {name: count for name, count in counts.items() if count}


class TokenDataset(Sequence[TokenizedDocument]):
    """The tokenized documents of a corpus: a sequence of `TokenizedDocument`, held as flat arrays of 32-bit numbers.

    `documents[i]` is the number in the corpus of the i-th document; a chat may be several. `fields` holds the fields
    of all documents, end to end. `report` counts what is odd about the corpus.
    """

    def __init__(self, rows: Iterable[tuple[int, TokenizedDocument]], report: TextReport | None = None) -> None:
        ids: list[Int32[np.ndarray, " T"]] = []
        labels: list[Int32[np.ndarray, " T"]] = []
        documents: list[int] = []
        self.turn_starts: list[tuple[int, ...] | None] = []
        fields: list[Mapping[str, np.ndarray]] = []
        for number, row in rows:
            ids.append(np.array(row.input_ids, dtype=np.int32))
            labels.append(np.array(row.labels, dtype=np.int32))
            documents.append(number)
            self.turn_starts.append(row.turn_starts)
            fields.append({name: to_array(name, value, len(row.input_ids)) for name, value in row.fields.items()})
        self.ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.labels = np.concatenate(labels) if labels else np.zeros(0, np.int32)
        self.ends = np.cumsum([len(document_ids) for document_ids in ids], dtype=np.int64)
        self.documents = np.array(documents, dtype=np.int64)
        self.fields = join_fields(fields, [len(document_ids) for document_ids in ids])
        self.report = report or TextReport()

    @property
    def drop_counts(self) -> Mapping[str, int]:
        """The number of documents that were left out, by reason."""
        return self.report.drop_counts

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> TokenizedDocument: ...
    @overload
    def __getitem__(self, i: slice) -> list[TokenizedDocument]: ...
    def __getitem__(self, i: int | slice) -> TokenizedDocument | list[TokenizedDocument]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        tokens = slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))
        fields = {
            name: values.tolist() if get_field(name).per == "token" else values[0].item()
            for name, values in slice_fields(self.fields, tokens, slice(i, i + 1)).items()
        }
        return TokenizedDocument(self.ids[tokens].tolist(), self.labels[tokens].tolist(), fields, self.turn_starts[i])

    @property
    def num_tokens(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """The number of tokens that are trained on."""
        return int((self.labels != IGNORE).sum())
