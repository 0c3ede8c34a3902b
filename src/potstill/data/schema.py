"""Recognizes from its columns what a row is: plain text, a prompt with its response, or a chat.

| columns | kind |
|---|---|
| `messages`: a list of `{role, content}`; or `conversations`: a list of `{from, value}` (ShareGPT) | chat |
| `prompt` and one of `response`, `completion`, `answer`, `output` | pairs |
| `instruction` and `output`, with `input` or not (Alpaca) | pairs |
| `instruction` and `response`, with `context` or not (Dolly) | pairs |
| `question` and `answer` (GSM8K) | pairs |
| `text`, without a column that could be a prompt | text |

The roles are system, developer, user, assistant and tool, in the spellings of `data.turns`, in any case. A chat may
have tool calls, thinking (`reasoning_content`, `thinking` or `reasoning`) and the column `tools`.

A chat takes precedence over a pair, and a pair over text, since many data sets hold both. Other columns are ignored.
Preference data (`chosen`, `rejected`; or a `label` on a chat) is refused, since rejected answers would be trained on.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from potstill.core.errors import DataError, UsageError
from potstill.data.turns import MalformedRow, quote_names, read_string, read_tools, read_turn, to_message

Kind = Literal["text", "pairs", "chat"]
Document = dict[str, Any]

PAIR_COLUMNS = {
    ("prompt", "response"): (),
    ("prompt", "completion"): (),
    ("prompt", "answer"): (),
    ("prompt", "output"): (),
    ("instruction", "output"): ("input",),
    ("instruction", "response"): ("context",),
    ("question", "answer"): (),
}
PROMPT_COLUMNS = frozenset(prompt_column for prompt_column, _ in PAIR_COLUMNS)
TOOLS_COLUMN = "tools"  # of a chat: the functions that its tool calls may name
ACCEPTED_COLUMNS = (
    "text; prompt with response, completion, answer or output; instruction with output (and input) or with response "
    "(and context); question with answer; messages; conversations"
)


@dataclass(frozen=True)
class RowSchema:
    """The kind of a row, the columns that are read, and the function that turns them into a document."""

    kind: Kind
    columns: tuple[str, ...]
    optional_columns: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Document]

    def to_document(self, row: Mapping[str, Any]) -> Document:
        """The document in a row.

        Raises: MalformedRow if a column is missing or holds a value of the wrong type.
        """
        missing_columns = [column for column in self.columns if column not in row]
        if missing_columns:
            raise MalformedRow(f"lacks {quote_names(missing_columns)}; it has {quote_names(row)}")
        return self.parse(row)


def recognize_schema(
    column_names: Collection[str], location: str, *, columns: Mapping[str, str] | None = None
) -> RowSchema:
    """The schema of rows with these column names, or the schema that the caller states in `columns`.

    Raises: DataError if no schema fits, or several do.
    """
    if columns is not None:
        return _build_stated_schema(columns, column_names, location)
    for column in ("messages", "conversations"):
        if column in column_names:
            _check_no_preferences(column_names, {"chosen", "rejected", "label"}, location)
            return _build_chat_schema(column)
    return _recognize_pair_or_text(column_names, location)


def _recognize_pair_or_text(column_names: Collection[str], location: str) -> RowSchema:
    _check_no_preferences(column_names, {"chosen", "rejected"}, location)
    pairs = [
        (pair, optional_columns) for pair, optional_columns in PAIR_COLUMNS.items() if set(pair) <= set(column_names)
    ]
    if len(pairs) == 1:
        ((pair, optional_columns),) = pairs
        _check_no_preferences(column_names, {"label"}, location)
        return _build_pair_schema(pair, optional_columns)
    if not pairs and "text" in column_names and not PROMPT_COLUMNS & set(column_names):
        return _build_text_schema("text")
    problem = "which fit more than one format" if pairs or "text" in column_names else "which fit no known format"
    raise DataError(
        f"{location} has the columns {quote_names(column_names)}, {problem}; accepted are {ACCEPTED_COLUMNS}; "
        f"or map them, as in --columns prompt=NAME,response=NAME"
    )


def _check_no_preferences(column_names: Collection[str], preference_columns: set[str], location: str) -> None:
    if preference_columns & set(column_names):
        raise DataError(
            f"{location} has {quote_names(sorted(preference_columns & set(column_names)))}, as preference "
            f"data has, and rejected answers would be trained on; name the columns to use, as in "
            f"--columns messages=NAME"
        )


def _build_stated_schema(columns: Mapping[str, str], column_names: Collection[str], location: str) -> RowSchema:
    missing_columns = [column for column in columns.values() if column not in column_names]
    if missing_columns:
        raise DataError(f"{location} has no column {quote_names(missing_columns)}; it has {quote_names(column_names)}")
    if set(columns) == {"text"}:
        return _build_text_schema(columns["text"])
    if set(columns) == {"prompt", "response"}:
        return _build_pair_schema((columns["prompt"], columns["response"]), ())
    if set(columns) == {"messages"}:
        return _build_chat_schema(columns["messages"])
    raise UsageError(
        f"columns {quote_names(columns)} do not define a document; give text, or prompt and response, or messages"
    )


def _build_chat_schema(column: str) -> RowSchema:
    def parse_row(row: Mapping[str, Any]) -> Document:
        tools = read_tools(row.get(TOOLS_COLUMN))
        document: Document = {"messages": [read_turn(turn) for turn in _read_list(row, column)]}
        return {**document, "tools": tools} if tools else document

    return RowSchema("chat", (column,), (TOOLS_COLUMN,), parse_row)


def _build_text_schema(column: str) -> RowSchema:
    return RowSchema("text", (column,), (), lambda row: {"text": read_string(row, column), "whole": True})


def _build_pair_schema(pair: tuple[str, str], optional_columns: tuple[str, ...]) -> RowSchema:
    prompt, response = pair

    def parse_row(row: Mapping[str, Any]) -> Document:
        parts = [
            read_string(row, prompt),
            *(read_string(row, column) for column in optional_columns if column in row),
        ]
        prompt_text = "\n\n".join(part for part in parts if part.strip())
        return {"prompt": prompt_text, "response": read_string(row, response)}

    return RowSchema("pairs", pair, optional_columns, parse_row)


def find_lack(document: Document) -> str | None:
    """The reason why a valid document cannot be trained on, such as `empty response`; None if it can."""
    if "messages" in document:
        answers = [to_message(turn) for turn in document["messages"] if turn["role"] == "assistant"]
        if not answers:
            return "no assistant turn"
        return None if any(turn["content"].strip() or turn.get("tool_calls") for turn in answers) else "empty answers"
    empty_fields = [name for name in ("text", "prompt", "response") if name in document and not document[name].strip()]
    return f"empty {empty_fields[0]}" if empty_fields else None


def _read_list(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list | tuple):
        raise MalformedRow(f"has {type(value).__name__} in `{column}`, where a list of turns is expected")
    return list(value)
