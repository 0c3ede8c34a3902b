"""The questions that are sampled for: rows of a data set, which may ask the same in several languages.

A row's `id` is shared by the versions of a question in several languages, its `language` names one of them. A row
without an id is a question of its own. All versions of a question are held out together, so that no language is trained
on what another is measured on.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from potstill.core.errors import DataError
from potstill.data.corpus import NAMED_SPLITS, Corpus
from potstill.data.prompt_rows import load_prompts
from potstill.data.split import choose_held_out
from potstill.data.turns import Message, to_message
from potstill.stages.candidates.options import CandidateOptions
from potstill.stages.corpus import load_data
from potstill.train.rewards.detectors import normalize_language
from potstill.train.rewards.language import LANGUAGE_KEY
from potstill.train.rewards.thinking import ENGLISH_KEY

ID_KEY = "id"


class Question(NamedTuple):
    """A prompt with its row. `number` is its place in the data, and seeds its samples; `language` may be empty."""

    number: int
    key: str
    language: str
    messages: Sequence[Message]
    row: Mapping[str, Any]
    tools: Sequence[Any] | None = None

    @property
    def keys(self) -> frozenset[str]:
        """What excludes the question: its own key, and its messages, since other data may have other ids."""
        return frozenset({self.key, write_key(self.messages)})

    @property
    def text(self) -> str:
        """The last message."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class QuestionSet:
    """The questions that are sampled for and those that are held out, in the order of the data, and facts of both."""

    train: Sequence[Question]
    validation: Sequence[Question]
    name: str
    digest: str

    @property
    def all(self) -> tuple[Question, ...]:
        """All questions."""
        return (*self.train, *self.validation)


def load_questions(options: CandidateOptions) -> QuestionSet:
    """The questions of `options.data`. `options.documents` of them, with all their versions, are sampled for.

    Splits that files are named by stay as they are; else a twentieth is held out by id.

    Raises: as `load_prompts` does.
    """
    if _has_named_splits(train := load_data(options, load=load_prompts)):
        corpora = [train, load_data(options, split="validation", load=load_prompts)]
        sets = [list(_read_questions(corpus, start)) for corpus, start in zip(corpora, (0, len(train)), strict=True)]
    else:
        questions = list(_read_questions(load_data(options, split="all", load=load_prompts), 0))
        held_out = choose_held_out([_digest(question.key) for question in questions])
        sets = [[q for q, out in zip(questions, held_out, strict=True) if out == is_out] for is_out in (False, True)]
    digest = hashlib.sha256(json.dumps([[dict(q.row) for q in part] for part in sets], default=str).encode())
    return QuestionSet(select_first(sets[0], options.documents), sets[1], train.name, digest.hexdigest())


def select_first(questions: Sequence[Question], count: int) -> list[Question]:
    """The first `count` questions with all their versions; all for 0."""
    selected = set(islice(dict.fromkeys(question.key for question in questions), count or None))
    return [question for question in questions if question.key in selected]


def load_excluded_keys(options: CandidateOptions) -> frozenset[str]:
    """The keys of the questions of `options.exclude`, by id and by messages; of named splits, those of training.

    Raises: as `load_prompts` does.
    """
    keys: set[str] = set()
    for name in options.exclude:
        source = replace(options, data=name, mix_exponent=1.0)
        corpus = load_data(source, load=load_prompts)
        corpus = corpus if _has_named_splits(corpus) else load_data(source, split="all", load=load_prompts)
        keys |= {key for question in _read_questions(corpus, 0) for key in question.keys}
    return frozenset(keys)


def group_by_key(questions: Iterable[Question]) -> dict[str, list[Question]]:
    """The versions of each question."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.key, []).append(question)
    return groups


def find_pivot_questions(questions: Iterable[Question], pivot: str) -> dict[str, Question]:
    """By key, the version of each question in the language `pivot`: its own row, or else a column `english`.

    The column holds a text, and is read for the pivot `en`.
    """
    versions: dict[str, Question] = {}
    for question in questions:
        text = question.row.get(ENGLISH_KEY)
        if question.language == pivot:
            versions[question.key] = question
        elif pivot == "en" and isinstance(text, str) and text.strip():
            row = {**question.row, LANGUAGE_KEY: pivot}
            messages = [{"role": "user", "content": text}]
            version = Question(-1 - question.number, question.key, pivot, messages, row)  # noise of its own
            versions.setdefault(question.key, version)
    return versions


def check_columns(questions: Iterable[Question], columns: Collection[str], *, reader: str) -> None:
    """Refuse a row without one of the `columns`, which `reader` reads.

    Raises: DataError.
    """
    for question in questions:
        if missing := [column for column in columns if question.row.get(column) in (None, "")]:
            raise DataError(
                f"the row of {question.text[:60]!r} has no `{missing[0]}`, which {reader} reads; add the column, or "
                f"leave the row out"
            )


def write_key(messages: Sequence[Message]) -> str:
    """The key of a question by its messages."""
    return json.dumps(messages, sort_keys=True)


def _has_named_splits(corpus: Corpus) -> bool:
    return corpus.provenance.get("split") == NAMED_SPLITS


def _read_questions(corpus: Corpus, start: int) -> Iterator[Question]:
    for number, document in enumerate(corpus.documents, start):
        row = json.loads(document["row"])
        messages = [to_message(turn) for turn in document["prompt"]]
        name = row.get(ID_KEY)
        key = write_key(messages) if name in (None, "") else f"id {name}"
        language = normalize_language(str(row.get(LANGUAGE_KEY) or ""))
        tools = json.loads(document["tools"]) if document.get("tools") else None
        yield Question(number, key, language, messages, row, tools)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
