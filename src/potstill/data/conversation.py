"""Builds the turns of a chat from the columns of a row: a system prompt, a history, lists of messages, answers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from potstill.data.turns import MalformedRow, is_trained, read_string, read_tools, read_turn, to_message

Turn = dict[str, str]


def build_chat(row: Mapping[str, Any], turns: Sequence[Turn], system: str, tools: str = "tools") -> dict[str, Any]:
    """A chat of these turns. The columns `system` and `tools` add a system prompt, where no turn is one, and tools.

    Raises: MalformedRow for a system prompt that is no text, or tools that are no list of objects.
    """
    system_prompt = read_string(row, system) if system and system in row else ""
    if system_prompt.strip() and not (turns and turns[0]["role"] in ("system", "developer")):
        turns = [{"role": "system", "content": system_prompt}, *turns]
    document: dict[str, Any] = {"messages": list(turns)}
    tools_text = read_tools(row.get(tools))
    return {**document, "tools": tools_text} if tools_text else document


def read_turns(row: Mapping[str, Any], column: str) -> list[Turn]:
    """The turns in a column: a list of them, as it is or as JSON.

    Raises: MalformedRow, UntrainableRow as `read_turn` does.
    """
    return [read_turn(turn) for turn in _read_list(row, column, "turns")]


def read_history(row: Mapping[str, Any], column: str) -> list[Turn]:
    """The turns of a list of `[question, answer]`; none for null or an empty column.

    Raises: MalformedRow for an entry that is no pair of texts.
    """
    if not column or not row.get(column):
        return []
    turns = []
    for exchange in _read_list(row, column, "[question, answer]"):
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise MalformedRow(f"has an entry in `{column}` that is not [question, answer]")
        question, answer = exchange
        turns += [read_turn({"role": "user", "content": question}), read_turn({"role": "assistant", "content": answer})]
    return turns


def read_prompt_turns(row: Mapping[str, Any], column: str) -> list[Turn]:
    """The turns of a prompt that is a list of messages, or of one text. Its answers are not trained on.

    Raises: MalformedRow, UntrainableRow as `read_turn` does.
    """
    if isinstance(row[column], str):
        return [read_turn({"role": "user", "content": row[column]})]
    turns = [(turn, read_turn(turn)) for turn in _read_list(row, column, "turns")]
    return [read_turn({**turn, "weight": 0}) if is_trained(to_message(result)) else result for turn, result in turns]


def read_response_turns(row: Mapping[str, Any], column: str) -> list[Turn]:
    """The turns of a response that is a list of messages, one message, or one text.

    Raises: MalformedRow, UntrainableRow as `read_turn` does.
    """
    value = row[column]
    if isinstance(value, list | tuple):
        return read_turns(row, column)
    return [read_turn(value if isinstance(value, Mapping) else {"role": "assistant", "content": value})]


def read_answer(row: Mapping[str, Any], column: str) -> str:
    """The answer in a column. Of several, as in SQuAD's `{"text": [...]}` or a list of texts, the first.

    Raises: MalformedRow for another type.
    """
    value = row[column]
    while not isinstance(value, str) and value is not None:
        if isinstance(value, Mapping) and "text" in value:
            value = value["text"]
        elif isinstance(value, list | tuple):
            value = value[0] if value else ""
        else:
            break
    return read_string({column: value}, column)


def _read_list(row: Mapping[str, Any], column: str, entries: str) -> list[Any]:
    value = row[column]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise MalformedRow(f"has a text in `{column}` that is not valid JSON") from error
    if not isinstance(value, list | tuple):
        raise MalformedRow(f"has {type(value).__name__} in `{column}`, where a list of {entries} is expected")
    return list(value)
