"""The turns of real data sets: roles in any spelling, tool calls, tools, thinking, marks; odd rows are left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.core.errors import DataError, UsageError
from potstill.data.corpus import load_corpus
from potstill.data.schema import recognize_schema
from potstill.data.split import fingerprint
from potstill.data.turns import get_tools, is_trained, read_turn, to_message, to_messages, to_row

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}

TURNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "capitals": ({"role": "Assistant ", "content": "a"}, {"role": "assistant", "content": "a"}),
    "a model": ({"from": "model", "value": "a"}, {"role": "assistant", "content": "a"}),
    "a developer": ({"role": "developer", "content": "a"}, {"role": "developer", "content": "a"}),
    "a tool": (
        {"role": "tool", "content": "a", "tool_call_id": "7"},
        {"role": "tool", "content": "a", "tool_call_id": "7"},
    ),
    "a function": ({"role": "function", "name": "f", "content": "a"}, {"role": "tool", "content": "a", "name": "f"}),
    "an observation": ({"from": "observation", "value": "a"}, {"role": "tool", "content": "a"}),
    "calls with nulls, as in Parquet": (
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**CALL, "function": {"name": "clock", "arguments": {"zone": "UTC", "other": None}}}],
        },
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "arguments as text": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "the old call": (
        {"role": "assistant", "content": "", "function_call": {"name": "clock", "arguments": '{"zone": "UTC"}'}},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "ShareGPT's call": (
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "UTC"}}'},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ),
    "null calls": ({"role": "assistant", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "a"}),
    "thinking": (
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm", "thinking": "hm", "reasoning": "hm"},
    ),
    "a weight of 0": (
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "assistant", "content": "a", "weight": 0},
    ),
    "a weight of 1": ({"role": "assistant", "content": "a", "weight": 1}, {"role": "assistant", "content": "a"}),
}


@pytest.mark.parametrize("arguments", ['{"zone": null}', '{"zone": null, "n": [null]}'])
def test_a_null_in_the_json_text_of_a_call_stays(arguments: str) -> None:
    call = {"name": "clock", "arguments": json.loads(arguments)}
    for turn in (
        {"from": "function_call", "value": json.dumps(call)},
        {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": arguments}}]},
    ):
        assert to_message(read_turn(turn))["tool_calls"][0]["function"] == call


@pytest.mark.parametrize(("turn", "message"), TURNS.values(), ids=list(TURNS))
def test_a_turn_is_read_in_every_spelling_and_its_row_reads_the_same(
    turn: dict[str, Any], message: dict[str, Any]
) -> None:
    schema = recognize_schema({"messages": []}, "a file")
    document = schema.to_document({"messages": [USER, turn]})
    assert to_messages(document) == [USER, message]
    assert schema.to_document(to_row(document)) == document


def test_a_turn_of_weight_0_is_not_trained_on() -> None:
    schema = recognize_schema({"messages": []}, "a file")
    turns = [USER, {"role": "assistant", "content": "a", "train": False}, {"role": "assistant", "content": "b"}]
    assert [is_trained(to_message(turn)) for turn in schema.to_document({"messages": turns})["messages"]] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("tools", [[{"name": "f", "x": None}], '[{"name": "f"}]', {"name": "f"}])
def test_tools_are_read_as_objects_or_as_text(tools: Any) -> None:
    document = recognize_schema({"messages": [], "tools": []}, "a file").to_document(
        {"messages": [USER], "tools": tools}
    )
    assert get_tools(document) == [{"name": "f"}]


def test_a_plain_chat_keeps_its_fingerprint_beside_chats_with_calls(lines: Callable[..., Path]) -> None:
    plain = {"messages": [USER, {"role": "assistant", "content": "a"}]}
    call = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [{"name": "f"}]}
    rows = list(load_corpus(lines([plain, call]), split="all").documents)
    assert fingerprint(plain) in {fingerprint(row) for row in rows}
    assert to_row(plain) in [to_row(row) for row in rows]
    assert [to_messages(row)[1].get("tool_calls") for row in rows if get_tools(row)] == [[CALL]]


def test_odd_rows_of_thousands_are_left_out_counted_and_named(lines: Callable[..., Path]) -> None:
    good = [{"messages": [USER, {"role": "assistant", "content": str(n)}]} for n in range(2000)]
    odd = [{"messages": [{"role": "narrator", "content": "a"}]}] * 4
    path = lines([*good[:5], *odd, *good[5:]])
    with pytest.raises(DataError, match=r"line 6 has a turn of the role 'narrator'.*--on-bad-row skip"):
        load_corpus(path)
    corpus = load_corpus(path, split="all", on_bad_row="skip")
    assert len(corpus) == 2000
    assert corpus.drop_counts == {"a row that cannot be read": 4}
    assert [row.split(", ")[1].split(" has")[0] for row in corpus.bad_rows] == ["line 6", "line 7", "line 8"]


def test_a_set_of_odd_rows_alone_is_refused_and_names_the_first(lines: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"1 with a row that cannot be read; .*line 1 has a turn of the role"):
        load_corpus(lines([{"messages": [{"role": "narrator", "content": "a"}]}]), on_bad_row="skip")
    with pytest.raises(UsageError, match="--on-bad-row is 'drop'; it can be refuse or skip"):
        load_corpus("stdlib", on_bad_row="drop")
