"""Reads the turns of a chat in the spellings of OpenAI, ShareGPT and TRL: roles, text, tool calls and thinking.

A turn is stored as `role` and `content`. What else a chat template may read is in `fields`, a JSON object as text:
`tool_calls`, `tool_call_id`, `name`, `thinking`, and `weight` (0: not trained on). So all turns have one Arrow type.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

Message = Mapping[str, Any]

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
}
CALL_ROLES = ("function_call", "tool_call")  # ShareGPT's turns whose text is a call, as JSON
THINKING_NAMES = ("reasoning_content", "thinking", "reasoning")  # in data, and in the templates of families
MARKS = ("weight", "train", "trainable", "training", "loss", "loss_weight")  # false or 0: the turn is not trained on
TEXT_PART_TYPES = (None, "text", "input_text", "output_text")


class MalformedRow(ValueError):
    """A row that cannot be read. The caller adds the file and the line to the message."""


class UntrainableRow(ValueError):
    """A valid row that cannot be trained on. The message is the reason, by which such rows are counted."""


def read_turn(turn: Any) -> dict[str, str]:
    """The turn with its role, its text and, if it has any, its other fields.

    Raises: MalformedRow for a turn without role or text, of an unknown role, with content that is no text, or with tool
    calls of no known form; UntrainableRow for a turn whose content is null.
    """
    if not isinstance(turn, Mapping) or not ("role" in turn or {"from", "value"} <= set(turn)):
        raise _describe_turn(turn)
    role_name, text_name = ("role", "content") if "role" in turn else ("from", "value")
    spelling = turn[role_name].strip().lower() if isinstance(turn[role_name], str) else turn[role_name]
    if not isinstance(spelling, str) or spelling not in ROLES:
        raise MalformedRow(f"has a turn of the role {turn[role_name]!r}; known are {', '.join(ROLES)}")
    fields = _read_fields(turn)
    if text_name not in turn and "tool_calls" not in fields:
        raise _describe_turn(turn)
    if turn.get(text_name) is None and "tool_calls" not in fields:
        raise UntrainableRow("a turn without content")
    content = _read_content(turn, text_name) if text_name in turn else ""
    if spelling in CALL_ROLES and (calls := _parse_calls(content)):
        fields, content = {**fields, "tool_calls": calls}, ""
    result = {"role": ROLES[spelling], "content": content}
    return {**result, "fields": json.dumps(fields, ensure_ascii=False, sort_keys=True)} if fields else result


def _describe_turn(turn: Any) -> MalformedRow:
    description = quote_names(turn) if isinstance(turn, Mapping) else type(turn).__name__
    return MalformedRow(f"has a turn with {description}; every turn needs role and content (or from and value)")


def _read_content(turn: Mapping[str, Any], column: str) -> str:
    """The text of a turn: a text, or the texts of its parts end to end.

    Raises: MalformedRow for a part that is no text, such as an image.
    """
    parts = turn[column]
    if not isinstance(parts, list | tuple):
        return read_string(turn, column)
    texts = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping) or part.get("type") not in TEXT_PART_TYPES or "text" not in part:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise MalformedRow(f"has a part of the type {kind!r} in `{column}`, and only text can be trained on")
        texts.append(read_string(part, "text"))
    return "".join(texts)


def _read_fields(turn: Mapping[str, Any]) -> dict[str, Any]:
    """What a turn holds beside role and text."""
    fields: dict[str, Any] = {
        name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str) and turn[name]
    }
    thinking = next((turn[name] for name in THINKING_NAMES if isinstance(turn.get(name), str) and turn[name]), None)
    calls = _parse_calls(turn.get("tool_calls") or turn.get("function_call") or [])
    if calls is None:
        raise MalformedRow("has a turn with tool_calls that are no list of calls with a name and arguments")
    has_weight = all(turn[mark] not in (0, False) for mark in MARKS if turn.get(mark) is not None)
    return {
        **fields,
        **({"thinking": thinking} if thinking else {}),
        **({"tool_calls": calls} if calls else {}),
        **({} if has_weight else {"weight": 0}),
    }


def _parse_calls(value: Any) -> list[dict[str, Any]] | None:
    """Tool calls as `[{"type": "function", "function": {"name", "arguments"}}]`; None if `value` holds none.

    A call may stand alone, be JSON in a text, or lack the outer level. Arguments that are a JSON object as text are
    parsed, as Hugging Face's templates expect. Nulls of a table are left out, since Parquet fills them in for fields of
    other rows; nulls of a JSON text stay.
    """
    is_text, value = isinstance(value, str), _parse_json(value)
    calls = [_parse_json(call) for call in (value if isinstance(value, list | tuple) else [value])]
    result = []
    for call in calls:
        if not isinstance(call, Mapping):
            return None
        function = _parse_json(call.get("function") or call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return None
        arguments = function.get("arguments", function.get("parameters")) or {}
        arguments = _parse_json(arguments) if is_text or isinstance(arguments, str) else drop_nulls(arguments)
        outer = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append({**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def read_tools(value: Any) -> str | None:
    """The tools of a chat, which may be JSON as text, as a JSON list; None if there are none.

    Raises: MalformedRow if they are no list of objects.
    """
    if value is None or value == "":
        return None
    tools = _parse_json(value)
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list | tuple) or not all(isinstance(_parse_json(tool), Mapping) for tool in tools):
        raise MalformedRow(f"has {type(value).__name__} in its tools, where a list of objects is expected")
    return json.dumps([drop_nulls(_parse_json(tool)) for tool in tools], ensure_ascii=False) if tools else None


def _parse_json(value: Any) -> Any:
    """The value of a JSON object or list in a text; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def drop_nulls(value: Any) -> Any:
    """`value` without the entries of objects that are null, at all depths."""
    if isinstance(value, Mapping):
        return {name: drop_nulls(entry) for name, entry in value.items() if entry is not None}
    return [drop_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value


def to_messages(document: Mapping[str, Any]) -> list[Message]:
    """The messages of a chat as a chat template reads them, or a pair as a chat of two messages."""
    if "messages" in document:
        return [to_message(turn) for turn in document["messages"]]
    return [
        {"role": "user", "content": document["prompt"]},
        {"role": "assistant", "content": document["response"]},
    ]


def to_message(turn: Mapping[str, Any]) -> Message:
    """A stored turn as one mapping, with its thinking under every name that templates give it."""
    fields = json.loads(turn.get("fields") or "{}")
    thinking = fields.pop("thinking", None)
    names = dict.fromkeys(THINKING_NAMES, thinking) if thinking else {}
    return {"role": turn["role"], "content": turn["content"], **fields, **names}


def get_tools(document: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a chat; None without any."""
    return json.loads(document["tools"]) if document.get("tools") else None


def to_row(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as a row of a JSON file, which reads as the same document; with the name of its language, if any."""
    if "messages" not in document:
        return {name: value for name, value in document.items() if value is not None}
    tools = get_tools(document)
    facts = {"tools": tools, "language": document.get("language")}
    return {"messages": to_messages(document), **{name: value for name, value in facts.items() if value}}


def is_trained(message: Message) -> bool:
    """Whether a message is an answer that is trained on: an assistant's, without a weight of 0."""
    return bool(message["role"] == "assistant" and message.get("weight", 1))


def read_string(row: Mapping[str, Any], column: str) -> str:
    """The text in a column; empty for null.

    Raises: MalformedRow for another type, or for half a surrogate pair.
    """
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MalformedRow(f"has {type(value).__name__} in `{column}`, where text is expected")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise MalformedRow(f"has half a surrogate pair in `{column}`, which is not valid text") from error
    return value


def quote_names(names: Collection[str]) -> str:
    """Names in backquotes, long ones shortened; `nothing` without any."""
    return ", ".join(f"`{_shorten_name(name)}`" for name in names) or "nothing"


def _shorten_name(name: object) -> str:
    text = str(name)
    return text if len(text) <= 40 else text[:37] + "..."
