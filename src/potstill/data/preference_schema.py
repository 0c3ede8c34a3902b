"""Recognizes from its columns how a row holds preferences: two answers to a prompt, or one answer with a verdict.

| columns | format |
|---|---|
| `chosen` and `rejected`, beside a prompt | TRL with explicit prompts; LLaMA-Factory; UltraFeedback, binarized |
| `chosen` and `rejected`, each the whole chat | TRL with implicit prompts; HH-RLHF |
| `completions` with scores, beside a prompt | UltraFeedback: the best and the worst one |
| `label`, beside a prompt with its completion, or a chat that ends with it | KTO |

A prompt is `prompt`, `instruction`, `question` or `query`, or else `input`: a text, a transcript (`data.transcript`) or
a list of messages. `input`, `context`, `system`, `system_prompt` and `history` belong to it. Or the prompt is
`messages`, `conversations` or `conversation`. A side is a text, a transcript, a message, or a list of messages; a list
that begins with a turn of the user or the system is the whole chat. What becomes of the sides: `data.preference_sides`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from potstill.core.errors import DataError, UsageError
from potstill.data.conversation import (
    Turn,
    build_chat,
    read_history,
    read_prompt_turns,
    read_response_turns,
    read_turns,
)
from potstill.data.preference_sides import (
    build_labeled_answer,
    build_pair,
    choose_completions,
    drop_weights,
    join_chat,
    read_label,
)
from potstill.data.schema import (
    CHAT_COLUMNS,
    CONTEXT_COLUMNS,
    HISTORY_COLUMN,
    PROMPT_COLUMNS,
    RESPONSE_COLUMNS,
    SYSTEM_COLUMNS,
    TOOLS_COLUMN,
    Document,
    PromptColumns,
    RowSchema,
    check_stated_columns,
    recognize_schema,
)
from potstill.data.transcript import is_transcript, read_transcript
from potstill.data.turns import UntrainableRow, quote_names, read_turn

Row = Mapping[str, Any]

SIDES = ("chosen", "rejected")
LABEL_COLUMNS = ("label", "kto_tag")
SCORED_COLUMN = "completions"
OPTIONAL_COLUMNS = (*CONTEXT_COLUMNS, *SYSTEM_COLUMNS, HISTORY_COLUMN, TOOLS_COLUMN)
STATED_COLUMNS = ("prompt", *CONTEXT_COLUMNS, "system", "history", "messages", "tools", *SIDES, "completion", "label")
ACCEPTED_PREFERENCES = (
    "chosen with rejected, beside a prompt (prompt, instruction, question, query, input, messages or conversations) or "
    "each with the whole chat; completions with scores, beside a prompt; label with a prompt and its completion, or "
    "with messages or conversations that end with it"
)


@dataclass(frozen=True, kw_only=True)
class _Format:
    """Where rows hold their prompt and their answers. A column is empty where the format has none."""

    prompt: PromptColumns | None = None
    messages: str = ""
    answers: tuple[str, ...] = ()  # two sides, or one completion, or the scored completions
    label: str = ""

    @property
    def main_columns(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        prompt = self.prompt.prompt if self.prompt else self.messages
        return tuple(filter(None, (prompt, *self.answers, self.label)))


def is_preference_row(row: Row, columns: Mapping[str, str] | None = None) -> bool:
    """Whether rows with these columns hold preferences, by their names or by those that `columns` gives them."""
    return _find_format(_rename(row, columns)) is not None


def recognize_preferences(row: Row, location: str, *, columns: Mapping[str, str] | None = None) -> RowSchema:
    """The schema of rows of preferences like this one; `columns` maps our names to those of the rows.

    Its documents hold `prompt`, `chosen` and `rejected` (lists of turns), `label` and, if there are any, `tools`. The
    label of a pair is None. An answer with a label is `chosen` if that is true, else `rejected`; the other is empty.

    Raises: DataError if no format fits; UsageError for a name in `columns` that has no meaning.
    """
    if columns is not None:
        if not set(columns) <= set(STATED_COLUMNS):
            raise UsageError(
                f"columns {quote_names(columns)} do not define a preference; give some of {', '.join(STATED_COLUMNS)}"
            )
        check_stated_columns(columns, row, location)
    layout = _find_format(_rename(row, columns))
    if layout is None:
        raise DataError(
            f"{location} has the columns {quote_names(row)}, which hold no preferences; accepted are "
            f"{ACCEPTED_PREFERENCES}; or map them, as in --columns prompt=NAME,chosen=NAME,rejected=NAME"
        )
    all_names = (*layout.main_columns, *OPTIONAL_COLUMNS)
    names = dict(zip(all_names, all_names, strict=True)) if columns is None else columns
    main_columns = tuple(names[name] for name in layout.main_columns)
    optional = tuple(column for column in names.values() if column not in main_columns)
    return RowSchema("preferences", main_columns, optional, lambda row: _read_row(_rename(row, columns), layout))


def recognize_any(row: Row, location: str, *, columns: Mapping[str, str] | None = None) -> RowSchema:
    """The schema of rows like this one, whether they hold preferences or text, pairs and chats.

    Raises: as `recognize_preferences` and `recognize_schema` do.
    """
    recognize = recognize_preferences if is_preference_row(row, columns) else recognize_schema
    return recognize(row, location, columns=columns)


def _rename(row: Row, columns: Mapping[str, str] | None) -> Row:
    """The row under our names for its columns."""
    return row if columns is None else {name: row[column] for name, column in columns.items() if column in row}


def _find_format(row: Row) -> _Format | None:
    """The format of rows with these columns; None if they hold no preferences."""
    prompt = next((column for column in (*PROMPT_COLUMNS, "input") if column in row), "")
    messages = next((column for column in CHAT_COLUMNS if column in row), "")
    contexts = tuple(column for column in CONTEXT_COLUMNS if column != prompt)
    prompt_columns = PromptColumns(prompt=prompt, response="", contexts=contexts) if prompt else None
    if set(SIDES) <= set(row):
        return _Format(prompt=prompt_columns, messages="" if prompt else messages, answers=SIDES)
    label = next((column for column in LABEL_COLUMNS if column in row), "")
    completion = next((column for column in RESPONSE_COLUMNS if column in row), "")
    if label and prompt and completion:
        return _Format(prompt=prompt_columns, answers=(completion,), label=label)
    if label and messages:
        return _Format(messages=messages, label=label)
    if prompt and isinstance(row.get(SCORED_COLUMN), list | tuple):
        return _Format(prompt=prompt_columns, answers=(SCORED_COLUMN,))
    return None


def _read_row(row: Row, layout: _Format) -> Document:
    chat = build_chat(row, _read_prompt(row, layout), _find_system(row), TOOLS_COLUMN)
    prompt = drop_weights(chat["messages"])
    answers = {column: row[column] for column in layout.answers}
    if SCORED_COLUMN in answers:
        answers = dict(zip(SIDES, choose_completions(answers[SCORED_COLUMN], SCORED_COLUMN), strict=True))
    chats = [join_chat(prompt, _read_side(value, column), column) for column, value in answers.items()] or [prompt]
    if layout.label:
        document = build_labeled_answer(chats[0], read_label(row[layout.label], layout.label))
    else:
        document = build_pair(*chats)
    return document | ({"tools": chat["tools"]} if "tools" in chat else {})


def _find_system(row: Row) -> str:
    return next((column for column in SYSTEM_COLUMNS if row.get(column)), "")


def _read_prompt(row: Row, layout: _Format) -> list[Turn]:
    """The turns before the answers; none where each side holds the whole chat."""
    if layout.prompt is None:
        return read_turns(row, layout.messages) if layout.messages else []
    value = row[layout.prompt.prompt]
    if isinstance(value, list | tuple):
        return read_prompt_turns(row, layout.prompt.prompt)
    if is_transcript(value):
        return read_transcript(value, has_answer=False)
    text = layout.prompt.read_prompt(row)
    if not text.strip():
        raise UntrainableRow("empty prompt")
    return [*read_history(row, HISTORY_COLUMN), read_turn({"role": "user", "content": text})]


def _read_side(value: Any, column: str) -> list[Turn]:
    if is_transcript(value):
        return read_transcript(value)
    return drop_weights(read_response_turns({column: value}, column))
