"""Recognizes from its columns where a row holds a prompt that a model is to answer, and keeps the row for rewards.

| columns | prompt |
|---|---|
| `messages`, `conversations` or `conversation` | the chat; without its last answer, if it ends in one |
| the first of `prompt`, `instruction`, `question`, `query`, `problem`, `input` | the text, or a list of messages |

`input`, `context`, `system`, `system_prompt` and `history` belong to the prompt, as in `data.schema`. All other
columns, such as `answer`, `language` and `solution`, are for rewards.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from potstill.core.errors import DataError, UsageError
from potstill.data.conversation import Turn, build_chat, read_history, read_prompt_turns, read_turns
from potstill.data.schema import (
    CHAT_COLUMNS,
    CONTEXT_COLUMNS,
    HISTORY_COLUMN,
    PROMPT_COLUMNS,
    TOOLS_COLUMN,
    Document,
    PromptColumns,
    RowSchema,
    check_stated_columns,
    find_system,
)
from potstill.data.turns import UntrainableRow, quote_names, read_turn

Row = Mapping[str, Any]

PROMPT_NAMES = (*PROMPT_COLUMNS, "problem", "input")
STATED_NAMES = ("prompt", "context", "system", "history", "messages", "tools")
NO_PROMPT = "an empty prompt"


def recognize_prompts(row: Row, location: str, *, columns: Mapping[str, str] | None = None) -> RowSchema:
    """The schema of rows like this one, or the one that the caller states in `columns`.

    Raises: DataError for a row without a prompt, or without a stated column; UsageError for columns that are no prompt.
    """
    names = dict(columns or {})
    if columns is not None:
        check_stated_columns(columns, row, location)
        if not set(names) <= set(STATED_NAMES) or len({"prompt", "messages"} & set(names)) != 1:
            raise UsageError(
                f"columns {quote_names(names)} do not define a prompt; give prompt (and context, system, history) or "
                f"messages (and system, tools)"
            )
    system = names.get("system", "") or find_system(row)
    chat = names.get("messages", "") if columns is not None else next((c for c in CHAT_COLUMNS if c in row), "")
    if chat:
        tools = names.get("tools", TOOLS_COLUMN)
        optional_columns = (*filter(None, (system,)), tools, *row)
        return _make_schema(chat, optional_columns, lambda row: read_turns(row, chat), system, tools)
    prompt = names.get("prompt", "") or next((name for name in PROMPT_NAMES if name in row), "")
    if not prompt:
        raise DataError(
            f"{location} has the columns {quote_names(row)} and no prompt; name it {', '.join(PROMPT_NAMES)} or "
            f"messages, or map it, as in --columns prompt=NAME"
        )
    contexts = tuple(c for c in CONTEXT_COLUMNS if c != prompt) if "context" not in names else (names["context"],)
    pair = PromptColumns(
        prompt=prompt, response="", contexts=contexts, system=system, history=names.get("history", HISTORY_COLUMN)
    )
    optional_columns = (*pair.optional, TOOLS_COLUMN, *row)  # rewards read the others
    return _make_schema(prompt, optional_columns, lambda row: _read_question(row, pair), system)


def _read_question(row: Row, pair: PromptColumns) -> list[Turn]:
    """The turns of a prompt that is a text with its context, behind a history; or that is a list of messages."""
    if isinstance(row[pair.prompt], list | tuple):
        return read_prompt_turns(row, pair.prompt)
    text = pair.read_prompt(row)
    if not text.strip():
        raise UntrainableRow(NO_PROMPT)
    return [*read_history(row, pair.history), read_turn({"role": "user", "content": text})]


def _make_schema(
    column: str,
    optional_columns: tuple[str, ...],
    read: Callable[[Row], Sequence[Turn]],
    system: str,
    tools: str = TOOLS_COLUMN,
) -> RowSchema:
    def parse(row: Row) -> Document:
        chat = build_chat(row, read(row), system, tools)
        turns = chat.pop("messages")
        if turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        if not any(turn["content"].strip() for turn in turns):
            raise UntrainableRow(NO_PROMPT)
        return {**chat, "prompt": turns, "row": json.dumps(row, ensure_ascii=False, default=str)}

    return RowSchema("prompts", (column,), optional_columns, parse)
