"""Which columns make a document: plain text, a prompt with its response, or a chat.

| columns | kind |
|---|---|
| `messages`: a list of `{role, content}`; or `conversations`: a list of `{from, value}` (ShareGPT) | chat |
| `prompt` and one of `response`, `completion`, `answer`, `output` | pairs |
| `instruction` and `output`, with `input` or not (Alpaca) | pairs |
| `instruction` and `response`, with `context` or not (Dolly) | pairs |
| `question` and `answer` (GSM8K) | pairs |
| `text`, with nothing that looks like a prompt beside it | text |

A chat wins over a pair and a pair over text, since data sets often carry both. Other columns are passed over. Sets of
preferences (`chosen`, `rejected`; or a `label` on a chat) are refused: training on what was rejected is no one's wish.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from potstill.core.errors import DataError, UsageError

Kind = Literal["text", "pairs", "chat"]
Document = dict[str, Any]

PAIRS = {
    ("prompt", "response"): (),
    ("prompt", "completion"): (),
    ("prompt", "answer"): (),
    ("prompt", "output"): (),
    ("instruction", "output"): ("input",),
    ("instruction", "response"): ("context",),
    ("question", "answer"): (),
}
PROMPTS = frozenset(first for first, _ in PAIRS)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
ACCEPTED = (
    "text; prompt with response, completion, answer or output; instruction with output (and input) or with response "
    "(and context); question with answer; messages; conversations"
)


class Malformed(ValueError):
    """A row that cannot be read; whoever knows the file and the line says so."""


@dataclass(frozen=True)
class Shape:
    """What a row means: its kind, the columns that are read, and how they become a document."""

    kind: Kind
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Document]

    def document(self, row: Mapping[str, Any]) -> Document:
        """The document in a row.

        Raises: Malformed where a column is missing or holds something else than it should.
        """
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise Malformed(f"lacks {_quoted(missing)}; it has {_quoted(row)}")
        return self.read(row)


def recognise(found: Collection[str], where: str, *, columns: Mapping[str, str] | None = None) -> Shape:
    """The shape of rows with the columns `found`, or the one that the caller states by `columns`.

    Raises: DataError where no shape fits, or two do.
    """
    if columns is not None:
        return _stated(columns, found, where)
    for column in ("messages", "conversations"):
        if column in found:
            _refuse_preferences(found, {"chosen", "rejected", "label"}, where)
            return _chat(column)
    return _pair_or_text(found, where)


def _pair_or_text(found: Collection[str], where: str) -> Shape:
    _refuse_preferences(found, {"chosen", "rejected"}, where)
    pairs = [(pair, extra) for pair, extra in PAIRS.items() if set(pair) <= set(found)]
    if len(pairs) == 1:
        ((pair, extra),) = pairs
        _refuse_preferences(found, {"label"}, where)
        return _pair(pair, extra)
    if not pairs and "text" in found and not PROMPTS & set(found):
        return _plain("text")
    what = "which could be read in more than one way" if pairs or "text" in found else "none of which is known"
    raise DataError(
        f"{where} has the columns {_quoted(found)}, {what}; accepted are {ACCEPTED}; or say which column is which, "
        f"as in --columns prompt=NAME,response=NAME"
    )


def _refuse_preferences(found: Collection[str], signs: set[str], where: str) -> None:
    if signs & set(found):
        raise DataError(
            f"{where} has {_quoted(sorted(signs & set(found)))}, as sets of preferences have, and what was rejected "
            f"would be trained on like the rest; say which columns are meant, as in --columns messages=NAME"
        )


def _stated(columns: Mapping[str, str], found: Collection[str], where: str) -> Shape:
    missing = [column for column in columns.values() if column not in found]
    if missing:
        raise DataError(f"{where} has no column {_quoted(missing)}; it has {_quoted(found)}")
    if set(columns) == {"text"}:
        return _plain(columns["text"])
    if set(columns) == {"prompt", "response"}:
        return _pair((columns["prompt"], columns["response"]), ())
    if set(columns) == {"messages"}:
        return _chat(columns["messages"])
    raise UsageError(f"columns {_quoted(columns)} make no document; state text, or prompt and response, or messages")


def _chat(column: str) -> Shape:
    return Shape("chat", (column,), (), lambda row: {"messages": [_turn(turn) for turn in _list(row, column)]})


def _plain(column: str) -> Shape:
    return Shape("text", (column,), (), lambda row: {"text": _string(row, column), "whole": True})


def _pair(pair: tuple[str, str], extra: tuple[str, ...]) -> Shape:
    prompt, response = pair

    def read(row: Mapping[str, Any]) -> Document:
        parts = [_string(row, prompt), *(_string(row, column) for column in extra if column in row)]
        asked = "\n\n".join(part for part in parts if part.strip())
        return {"prompt": asked, "response": _string(row, response)}

    return Shape("pairs", pair, extra, read)


def lack(document: Document) -> str | None:
    """What an otherwise valid document lacks to be trained on, as `empty response`; None if nothing."""
    if "messages" in document:
        answers = [turn["content"] for turn in document["messages"] if turn["role"] == "assistant"]
        if not answers:
            return "no assistant turn"
        return None if any(answer.strip() for answer in answers) else "empty answers"
    empty = [name for name in ("text", "prompt", "response") if name in document and not document[name].strip()]
    return f"empty {empty[0]}" if empty else None


def _turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping) or not ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn)):
        shown = _quoted(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise Malformed(f"has a turn with {shown}; every turn needs role and content (or from and value)")
    role, content = ("role", "content") if "role" in turn else ("from", "value")
    if turn.get("tool_calls"):
        raise Malformed("has a turn with tool_calls, which cannot be trained on yet; leave such rows out")
    if not isinstance(turn[role], str) or turn[role] not in ROLES:
        raise Malformed(f"has a turn of the role {turn[role]!r}; known are {', '.join(ROLES)}")
    return {"role": ROLES[turn[role]], "content": _string(turn, content)}


def _list(row: Mapping[str, Any], column: str) -> list[Any]:
    value = row[column]
    if not isinstance(value, list | tuple):
        raise Malformed(f"has {type(value).__name__} in `{column}`, where a list of turns belongs")
    return list(value)


def _string(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"has {type(value).__name__} in `{column}`, where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Malformed(f"has half a surrogate pair in `{column}`, which is no text") from error
    return value


def _quoted(names: Collection[str]) -> str:
    return ", ".join(f"`{_short(name)}`" for name in names) or "nothing"


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= 40 else text[:37] + "..."
