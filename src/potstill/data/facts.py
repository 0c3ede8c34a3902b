"""Facts to edit: the same statement in one or several languages, with questions that test the edit.

Two forms of rows are read, from any file that `files` reads:

- **By language**, as in BMIKE-53 (arXiv:2406.17764) and MzsRE (arXiv:2312.13040):
  `{"en": {"subject", "src", "rephrase", "alt", "loc", "loc_ans", "port", "port_ans"}, "fr": {...}}`.
- **Plain**, one language a row: `subject, prompt, target, paraphrases, rephrase, language, locality, portability`.

Both forms take the columns of both. Rows with the same prompt and target in one language are the same fact, so a fact
may come from several files. Plain rows with the same `fact` are the same fact, too.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from potstill.core.errors import DataError, NotFound, UsageError
from potstill.core.in_memory import resolve_path
from potstill.core.suggestions import suggest
from potstill.data.files import Record, list_files, read_records
from potstill.models.edits import find_trigger

UNKNOWN_LANGUAGE = "und"  # ISO 639-3: undetermined
LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
SYNONYMS = {  # of the benchmarks; `old` and `case_id` are not read
    "src": "prompt",
    "alt": "target",
    "loc": "locality",
    "loc_ans": "locality_answer",
    "port": "portability",
    "port_ans": "portability_answer",
    "New Question": "prompt",
    "New Answer": "answer",
}
UNREAD = ("old", "case_id")
TEXT_COLUMNS = ("subject", "prompt", "target", "rephrase")
QUESTION_COLUMNS = ("locality", "portability")
COLUMNS = (
    *TEXT_COLUMNS,
    "paraphrases",
    *QUESTION_COLUMNS,
    "locality_answer",
    "portability_answer",
    "language",
    "fact",
    *UNREAD,
)


class Question(NamedTuple):
    """A question with its answer, which is empty where none is known."""

    prompt: str
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class FactText:
    """A fact in one language: the question `prompt` about `subject`, whose answer is to become `target`.

    `paraphrases` locate neurons. `rephrase` is the same question in other words, held out for generality. The answers
    to `locality` must not change. `portability` asks for what follows from the fact.
    """

    prompt: str
    target: str
    subject: str = ""
    rephrase: str = ""
    paraphrases: tuple[str, ...] = ()
    locality: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()

    @property
    def names_subject(self) -> bool:
        """Whether the prompt contains the subject, as whole words in any case of their letters."""
        return find_trigger(self.prompt, self.subject) is not None


Fact = dict[str, FactText]  # by language


def load_facts(sources: Sequence[str], *, languages: Sequence[str] = (), limit: int | None = None) -> list[Fact]:
    """The first `limit` facts of files or folders, each in those of `languages` that it has; by default in all.

    Raises: NotFound; DataError for a row that is no fact, or without any fact; UsageError for a language that no fact
    has.
    """
    facts: list[Fact] = []
    indices: dict[tuple[str, ...], int] = {}
    for source in sources:
        path = resolve_path(source)
        if not path.exists():
            raise NotFound(f"there is no file or folder {source}; give facts that are here")
        for file in list_files(path):
            for record in read_records(file):
                _add_fact(facts, indices, record)
    if not facts:
        raise DataError(f"{', '.join(sources)} holds no fact; give rows with subject, prompt and target")
    present = list(dict.fromkeys(language for fact in facts for language in fact))
    if unknown := [language for language in languages if language not in present]:
        raise UsageError(
            f"the facts have no language {unknown[0]!r}{suggest(unknown[0], present)}; they have {', '.join(present)}"
        )
    selected = [{name: fact[name] for name in languages or fact if name in fact} for fact in facts]
    return [fact for fact in selected if fact][:limit]


def list_languages(facts: Sequence[Fact]) -> list[str]:
    """The languages of facts, in the order of their first text."""
    return list(dict.fromkeys(language for fact in facts for language in fact))


def count_missing_subjects(facts: Sequence[Fact]) -> int:
    """How many texts have a prompt that does not contain their subject."""
    return sum(not text.names_subject for fact in facts for text in fact.values())


def _add_fact(facts: list[Fact], indices: dict[tuple[str, ...], int], record: Record) -> None:
    """Adds the texts of a row to the fact that they belong to, or to a new one."""
    texts = _read_row(record)
    keys: list[tuple[str, ...]] = [(language, text.prompt, text.target) for language, text in texts.items()]
    if record.row.get("fact") is not None and "prompt" in _rename(record.row):
        keys.append((str(record.row["fact"]),))
    index = next((indices[key] for key in keys if key in indices), len(facts))
    if index == len(facts):
        facts.append({})
    for language, text in texts.items():
        facts[index].setdefault(language, text)
    indices.update(dict.fromkeys(keys, index))


def _read_row(record: Record) -> Fact:
    row, location = record
    if row and all(isinstance(value, Mapping) for value in row.values()):
        return {
            _check_language(language, location): _read_text(entry, f"{location}, {language}")
            for language, entry in row.items()
            if entry
        }
    language = _check_language(str(row.get("language") or UNKNOWN_LANGUAGE), location)
    return {language: _read_text(row, location)}


def _read_text(entry: Mapping[str, Any], location: str) -> FactText:
    for column in entry:
        if SYNONYMS.get(column, column) not in COLUMNS:
            names = sorted({*COLUMNS, *SYNONYMS})
            raise DataError(
                f"{location} has the column {column!r}{suggest(column, names)}, which no fact has; its columns are "
                f"{', '.join(COLUMNS)}"
            )
    values = _rename(entry)
    for column in TEXT_COLUMNS:
        if values.get(column) is not None and not isinstance(values[column], str):
            raise DataError(f"{location} has a {column} that is no text; write it as a string")
    subject, prompt, target, rephrase = ((values.get(column) or "").strip() for column in TEXT_COLUMNS)
    if not prompt or not target:
        raise DataError(f"{location} has no {'target' if prompt else 'prompt'}; a fact has subject, prompt and target")
    questions = {
        column: tuple(_read_questions(values.get(column), values.get(f"{column}_answer"), f"{location}, {column}"))
        for column in QUESTION_COLUMNS
    }
    if any(not question.answer for question in questions["portability"]):
        raise DataError(
            f"{location}, portability, holds a question without an answer; write an object of prompt and answer, and "
            f"the answer as one text"
        )
    return FactText(
        subject=subject,
        prompt=prompt,
        target=target,
        rephrase=rephrase,
        paraphrases=tuple(_read_texts(values.get("paraphrases"), f"{location}, paraphrases")),
        locality=questions["locality"],
        portability=questions["portability"],
    )


def _read_questions(value: Any, answer: Any, location: str) -> Iterator[Question]:
    """One question, or several, each as a text or as an object of `prompt` and `answer`."""
    for item in value if isinstance(value, list | tuple) else [] if not value else [value]:
        if isinstance(item, Mapping):
            names = _rename(item)
            item, answer = names.get("prompt"), names.get("answer")
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"{location} holds no question; write a text, or an object of prompt and answer")
        is_text = isinstance(answer, str | int | float)
        yield Question(item.strip(), str(answer).strip() if is_text else "")


def _read_texts(value: Any, location: str) -> Iterator[str]:
    for item in value if isinstance(value, list | tuple) else [] if not value else [value]:
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"{location} holds something that is no text; write a list of strings")
        yield item.strip()


def _rename(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {SYNONYMS.get(column, column): value for column, value in entry.items()}


def _check_language(name: str, location: str) -> str:
    """Refuse what is no code of a language. Raises: DataError."""
    if not LANGUAGE.fullmatch(name):
        raise DataError(f"{location} has the language {name!r}; write its code, such as en, fr or zh-cn")
    return name
