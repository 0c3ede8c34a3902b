"""Recognizes from its columns what a row is: plain text, a prompt with its response, or a chat.

| columns | kind |
|---|---|
| `messages`, `conversations` or `conversation`: a list of `{role, content}` or `{from, value}` | chat |
| a prompt and a response that are lists of messages (TRL); only the response is trained on | chat |
| `prompt`, `instruction`, `question` or `query`; and `response`, `completion`, `answer(s)` or `output` | pairs |
| `input` and `output` | pairs |
| `text`, without a column that could be a prompt | text |

What belongs to a prompt is read with it: `input` and `context` (Alpaca, Dolly, SQuAD); `system` or `system_prompt`, and
`history`, a list of `[question, answer]`, which make a pair a chat. A chat has the columns `system` and `tools` too.
The roles are system, developer, user, assistant and tool, in the spellings of `data.turns`, in any case. A chat may
have tool calls and thinking (`reasoning_content`, `thinking` or `reasoning`).

A chat takes precedence over a pair, and a pair over text, since many data sets hold both. Other columns are not read.
Preference data (`chosen`, `rejected`; or a `label` on a chat) is refused, since rejected answers would be trained on;
`data.preference_schema` reads it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from potstill.core.errors import DataError, UsageError
from potstill.data.conversation import (
    build_chat,
    read_answer,
    read_history,
    read_prompt_turns,
    read_response_turns,
    read_turns,
)
from potstill.data.turns import (
    MalformedRow,
    UntrainableRow,
    is_trained,
    quote_names,
    read_string,
    read_turn,
    to_message,
)

Kind = Literal["text", "pairs", "chat", "preferences", "prompts"]
Document = dict[str, Any]

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query")
RESPONSE_COLUMNS = ("response", "completion", "answer", "answers", "output")
CONTEXT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
HISTORY_COLUMN = "history"
TOOLS_COLUMN = "tools"  # of a chat: the functions that its tool calls may name
EXTRA_COLUMNS = (*CONTEXT_COLUMNS, *SYSTEM_COLUMNS, HISTORY_COLUMN, TOOLS_COLUMN)  # rows may lack them
STATED_COLUMNS = {
    "text": (),
    "messages": ("system", "tools"),
    "prompt": ("response", "context", "system", "history"),
}  # what --columns may name beside each
ACCEPTED_COLUMNS = (
    "text; prompt, instruction, question or query (and input, context, system, history) with response, completion, "
    "answer, answers or output; input with output; messages, conversations or conversation (and system, tools)"
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

        Raises: MalformedRow if a column is missing or holds a value of the wrong type; UntrainableRow for a turn
        without content.
        """
        missing_columns = [column for column in self.columns if column not in row]
        if missing_columns:
            raise MalformedRow(f"lacks {quote_names(missing_columns)}; it has {quote_names(row)}")
        return self.parse(row)


Recognizer = Callable[..., RowSchema]  # (row, location, *, columns): finds the schema of rows like this one


@dataclass(frozen=True, kw_only=True)
class PromptColumns:
    """The columns of a prompt with its response."""

    prompt: str
    response: str
    contexts: tuple[str, ...] = ()
    system: str = ""
    history: str = ""

    @property
    def optional(self) -> tuple[str, ...]:
        """All columns that a row may lack."""
        return (*self.contexts, *filter(None, (self.system, self.history)))

    def read_prompt(self, row: Mapping[str, Any]) -> str:
        """The prompt with its context, which stands before a question and behind an instruction."""
        parts = [read_string(row, self.prompt)]
        contexts = [read_string(row, column) for column in self.contexts if column in row]
        parts = [*contexts, *parts] if self.prompt == "question" else [*parts, *contexts]
        return "\n\n".join(part for part in parts if part.strip())


def recognize_schema(row: Mapping[str, Any], location: str, *, columns: Mapping[str, str] | None = None) -> RowSchema:
    """The schema of rows like this one, or the schema that the caller states in `columns`.

    Raises: DataError if no schema fits, or several do.
    """
    if columns is not None:
        return _build_stated_schema(columns, row, location)
    for column in CHAT_COLUMNS:
        if column in row and (column != CHAT_COLUMNS[-1] or isinstance(row[column], list | tuple)):
            _check_no_preferences(row, {"chosen", "rejected", "label"}, location)
            return _build_chat_schema(column, find_system(row) or SYSTEM_COLUMNS[0], TOOLS_COLUMN)
    return _recognize_pair_or_text(row, location)


def _recognize_pair_or_text(row: Mapping[str, Any], location: str) -> RowSchema:
    _check_no_preferences(row, {"chosen", "rejected"}, location)
    prompts = [column for column in PROMPT_COLUMNS if column in row]
    responses = [column for column in RESPONSE_COLUMNS if column in row]
    if not prompts and "input" in row and responses == ["output"]:
        prompts = ["input"]
    if len(prompts) == len(responses) == 1:
        _check_no_preferences(row, {"label"}, location)
        pair = PromptColumns(
            prompt=prompts[0],
            response=responses[0],
            contexts=tuple(column for column in CONTEXT_COLUMNS if column not in prompts),  # later rows may have them
            system=find_system(row),
            history=HISTORY_COLUMN if HISTORY_COLUMN in row else "",
        )
        return _build_pair_schema(pair, row)
    if not prompts and "text" in row:
        return _build_text_schema("text")
    is_ambiguous = (prompts and responses) or "text" in row
    problem = "which fit more than one format" if is_ambiguous else "which fit no known format"
    raise DataError(
        f"{location} has the columns {quote_names(row)}, {problem}; accepted are {ACCEPTED_COLUMNS}; "
        f"or map them, as in --columns prompt=NAME,response=NAME"
    )


def find_system(row: Mapping[str, Any]) -> str:
    """The column of a system prompt in rows like this one; empty if they have none."""
    return next((column for column in SYSTEM_COLUMNS if column in row), "")


def _check_no_preferences(row: Mapping[str, Any], preference_columns: set[str], location: str) -> None:
    if preference_columns & set(row):
        raise DataError(
            f"{location} has {quote_names(sorted(preference_columns & set(row)))}, as preference "
            f"data has, and rejected answers would be trained on; learn from preferences with potstill align, or name "
            f"the columns to use, as in --columns messages=NAME"
        )


def check_stated_columns(columns: Mapping[str, str], row: Mapping[str, Any], location: str) -> None:
    """Checks that rows like this one have the columns that the caller names.

    Raises: DataError for a column that they lack.
    """
    missing_columns = [column for column in columns.values() if column not in row]
    if missing_columns:
        raise DataError(f"{location} has no column {quote_names(missing_columns)}; it has {quote_names(row)}")


def _build_stated_schema(columns: Mapping[str, str], row: Mapping[str, Any], location: str) -> RowSchema:
    check_stated_columns(columns, row, location)
    main = next((name for name in STATED_COLUMNS if name in columns), None)
    if (
        main is None
        or not set(columns) <= {main, *STATED_COLUMNS[main]}
        or (main == "prompt" and "response" not in columns)
    ):
        raise UsageError(
            f"columns {quote_names(columns)} do not define a document; give text; or prompt and response (and context, "
            f"system, history); or messages (and system, tools)"
        )
    if main == "text":
        return _build_text_schema(columns["text"])
    system = columns.get("system", "")
    if main == "messages":
        return _build_chat_schema(columns["messages"], system or find_system(row), columns.get("tools", TOOLS_COLUMN))
    contexts = (columns["context"],) if "context" in columns else ()
    stated = PromptColumns(
        prompt=columns["prompt"],
        response=columns["response"],
        contexts=contexts,
        system=system,
        history=columns.get("history", ""),
    )
    return _build_pair_schema(stated, row)


def _build_chat_schema(column: str, system: str, tools: str) -> RowSchema:
    optional_columns = (*filter(None, (system,)), tools)
    return RowSchema(
        "chat", (column,), optional_columns, lambda row: build_chat(row, read_turns(row, column), system, tools)
    )


def _build_text_schema(column: str) -> RowSchema:
    return RowSchema("text", (column,), (), lambda row: {"text": read_string(row, column), "whole": True})


def _build_pair_schema(pair: PromptColumns, first_row: Mapping[str, Any]) -> RowSchema:
    """Pairs; or chats, where the columns hold a system prompt, a history or lists of messages."""

    def parse_pair(row: Mapping[str, Any]) -> Document:
        late_columns = [name for name in (*SYSTEM_COLUMNS, HISTORY_COLUMN) if name not in first_row and row.get(name)]
        if late_columns:
            raise MalformedRow(
                f"has {quote_names(late_columns)}, which the first rows lack; give all rows the same columns"
            )
        return {"prompt": pair.read_prompt(row), "response": read_answer(row, pair.response)}

    def parse_chat(row: Mapping[str, Any]) -> Document:
        prompt = pair.read_prompt(row)
        if not prompt.strip():
            raise UntrainableRow("empty prompt")
        turns = [
            *read_history(row, pair.history),
            read_turn({"role": "user", "content": prompt}),
            read_turn({"role": "assistant", "content": read_answer(row, pair.response)}),
        ]
        return build_chat(row, turns, pair.system)

    def parse_messages(row: Mapping[str, Any]) -> Document:
        turns = [*read_prompt_turns(row, pair.prompt), *read_response_turns(row, pair.response)]
        return build_chat(row, turns, pair.system)

    columns = (pair.prompt, pair.response)
    if isinstance(first_row[pair.prompt], list | tuple):
        return RowSchema("chat", columns, (*filter(None, (pair.system,)), TOOLS_COLUMN), parse_messages)
    if pair.system or pair.history:
        return RowSchema("chat", columns, (*pair.optional, TOOLS_COLUMN), parse_chat)
    return RowSchema("pairs", columns, pair.optional, parse_pair)


def find_lack(document: Document) -> str | None:
    """The reason why a valid document cannot be trained on, such as `empty response`; None if it can."""
    if "chosen" in document or "row" in document:
        return None  # its schema has refused what it lacks
    if "messages" in document:
        messages = [to_message(turn) for turn in document["messages"]]
        if not any(message["role"] == "assistant" for message in messages):
            return "no assistant turn"
        answers = [message for message in messages if is_trained(message)]
        if not answers:
            return "no assistant turn of a weight above 0"
        is_empty = [
            not (message["content"].strip() or any(message.get(name) for name in ("tool_calls", "thinking")))
            for message in answers
        ]
        return "an empty answer" if any(is_empty) else None
    empty_fields = [name for name in ("text", "prompt", "response") if name in document and not document[name].strip()]
    return f"empty {empty_fields[0]}" if empty_fields else None
