"""The two sides of a preference: what both have in common is the prompt, and the last turn of each is its answer.

    chosen      user "Hi"   assistant "Hello."   user "Sum 1 2"   assistant "3"
    rejected    user "Hi"   assistant "Hello."   user "Sum 1 2"   assistant "4"
                |------------------ prompt -------------------|   |-- answer --|

Sides may part earlier, and have different numbers of turns. Then what stands between prompt and answer is context.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from potstill.data.conversation import Turn
from potstill.data.turns import MalformedRow, UntrainableRow, to_message

EQUAL_SIDES = "equal sides"  # why a preference is left out
EMPTY_ANSWER = "an empty answer"
NO_PROMPT = "no prompt that both sides share"
NO_ANSWER = "a side that does not end with an answer"
EQUAL_SCORES = "answers of equal scores"
SYSTEM_ROLES = ("system", "developer")
SCORES = ("score", "overall_score", "fine-grained_score")  # of a completion, as in UltraFeedback
LABELS = {"true": True, "false": False, "1": True, "0": False}


def drop_weights(turns: Sequence[Turn]) -> list[Turn]:
    """The turns without the weights that say what is trained on, since only the last answer is."""
    return [_drop_weight(turn) for turn in turns]


def _drop_weight(turn: Turn) -> Turn:
    fields = json.loads(turn.get("fields") or "{}")
    if "weight" not in fields:
        return turn
    fields.pop("weight")
    bare = {name: turn[name] for name in ("role", "content")}
    return {**bare, "fields": json.dumps(fields, ensure_ascii=False, sort_keys=True)} if fields else bare


def join_chat(prompt: Sequence[Turn], side: Sequence[Turn], column: str) -> list[Turn]:
    """The whole chat of a side: its turns after those of the prompt, unless they hold the prompt already.

    Raises: MalformedRow for a chat of another prompt, or a prompt that ends with an answer.
    """
    if not side or side[0]["role"] not in (*SYSTEM_ROLES, "user"):
        if prompt and prompt[-1]["role"] == "assistant":
            raise MalformedRow(f"has a prompt that ends with an answer, before that of `{column}`")
        return [*prompt, *side]
    expected, turns = (_list_words(part) for part in (prompt, side))
    if turns[: len(expected)] != expected:
        raise MalformedRow(f"has a chat in `{column}` that does not begin with its prompt")
    has_system = side[0]["role"] in SYSTEM_ROLES
    return [*([] if has_system else takewhile(lambda turn: turn["role"] in SYSTEM_ROLES, prompt)), *side]


def _list_words(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Role and text of each turn, without those of the system."""
    return [(turn["role"], turn["content"].strip()) for turn in turns if turn["role"] not in SYSTEM_ROLES]


def build_pair(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> dict[str, Any]:
    """The document of two whole chats: `prompt`, the turns that both begin with, and what follows on each side.

    Raises: UntrainableRow for equal sides, a side without an answer, or no prompt in common.
    """
    if chosen == rejected:
        raise UntrainableRow(EQUAL_SIDES)
    _check_answer(chosen)
    _check_answer(rejected)
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    size = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _build_document(chosen[:size], chosen[size:], rejected[size:], None)


def build_labeled_answer(chat: Sequence[Turn], label: bool) -> dict[str, Any]:
    """The document of a whole chat whose last answer is desirable or not: on its side, the other being empty.

    Raises: UntrainableRow for a chat without an answer or a prompt.
    """
    _check_answer(chat)
    prompt, answer = chat[:-1], chat[-1:]
    return _build_document(prompt, answer if label else [], [] if label else answer, label)


def _build_document(
    prompt: Sequence[Turn], chosen: Sequence[Turn], rejected: Sequence[Turn], label: bool | None
) -> dict[str, Any]:
    if all(turn["role"] != "user" for turn in prompt):
        raise UntrainableRow(NO_PROMPT)
    return {"prompt": list(prompt), "chosen": list(chosen), "rejected": list(rejected), "label": label}


def _check_answer(chat: Sequence[Turn]) -> None:
    if not chat or chat[-1]["role"] != "assistant":
        raise UntrainableRow(NO_ANSWER)
    answer = to_message(chat[-1])
    if not (answer["content"].strip() or answer.get("tool_calls") or answer.get("thinking")):
        raise UntrainableRow(EMPTY_ANSWER)


def read_label(value: Any, column: str) -> bool:
    """A verdict: true or false, 1 or 0, also as text.

    Raises: MalformedRow for anything else.
    """
    label = LABELS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if label is None:
        raise MalformedRow(f"has {value!r} in `{column}`, where true or false is expected")
    return label


def choose_completions(value: Any, column: str) -> tuple[str, str]:
    """The texts of the best and of the worst of scored completions; of equal ones the first.

    Raises: MalformedRow for entries without a response and a score; UntrainableRow if no two scores differ.
    """
    entries = value if isinstance(value, list | tuple) else [value]
    scores = [_read_score(entry, column) for entry in entries]
    if len(set(scores)) < 2:
        raise UntrainableRow(EQUAL_SCORES)
    best, worst = (entries[scores.index(choose(scores))]["response"] for choose in (max, min))
    return best, worst


def _read_score(entry: Any, column: str) -> float:
    if isinstance(entry, Mapping) and isinstance(entry.get("response"), str):
        for name in SCORES:
            try:
                return float(entry[name])
            except (KeyError, TypeError, ValueError):
                continue
    raise MalformedRow(f"has a completion in `{column}` without a response and a score ({', '.join(SCORES)})")
