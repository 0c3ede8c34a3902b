"""Every documented shape is recognised; anything that could be meant otherwise is refused with what was found."""

import json
from typing import Any

import pytest

from potstill.core.errors import DataError, UsageError
from potstill.data.files import Record
from potstill.data.row_reader import RowReader
from potstill.data.schema import ACCEPTED_COLUMNS, find_lack, recognize_schema
from potstill.data.turns import MalformedRow, UntrainableRow

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "system", "value": "Be"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]

BE = {"role": "system", "content": "Be"}


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"text": "a", "url": "b"}, {"text": "a", "whole": True}),
    "text with a class": ({"text": "a", "label": 3}, {"text": "a", "whole": True}),
    "prompt and response": ({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"}),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}),
    "prompt and answer": ({"prompt": "a", "answer": "b"}, {"prompt": "a", "response": "b"}),
    "Alpaca": ({"instruction": "a", "input": "b", "output": "c"}, {"prompt": "a\n\nb", "response": "c"}),
    "Alpaca without input": ({"instruction": "a", "input": "", "output": "c"}, {"prompt": "a", "response": "c"}),
    "Alpaca with null input": ({"instruction": "a", "input": None, "output": "c"}, {"prompt": "a", "response": "c"}),
    "Alpaca with its rendering": ({"instruction": "a", "output": "c", "text": "x"}, {"prompt": "a", "response": "c"}),
    "Dolly": (
        {"instruction": "a", "context": "b", "response": "c", "category": "d"},
        {"prompt": "a\n\nb", "response": "c"},
    ),
    "GSM8K": ({"question": "a", "answer": "b"}, {"prompt": "a", "response": "b"}),
    "messages": ({"messages": CHAT}, {"messages": CHAT}),
    "messages with their prompt": ({"messages": CHAT, "prompt": "Hi"}, {"messages": CHAT}),
    "ShareGPT": (
        {"conversations": SHAREGPT, "id": 1},
        {"messages": [{"role": "system", "content": "Be"}, *CHAT]},
    ),
    "ShareGPT with columns": (
        {"conversations": SHAREGPT[1:], "system": "Be", "tools": '[{"name": "f"}]'},
        {"messages": [BE, *CHAT], "tools": '[{"name": "f"}]'},
    ),
    "ShareGPT with two system prompts": (
        {"conversations": SHAREGPT, "system": "Be other"},
        {"messages": [BE, *CHAT]},
    ),
    "LMSYS": ({"conversation": CHAT, "model": "m"}, {"messages": CHAT}),
    "messages as JSON": ({"messages": json.dumps(CHAT)}, {"messages": CHAT}),
    "parts of text": (
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"text": "lo"}]}]},
        {"messages": CHAT},
    ),
    "Alpaca with history and system": (
        {"instruction": "c", "input": "d", "output": "e", "system": "Be", "history": [["Hi", "Hello"]]},
        {"messages": [BE, *CHAT, *turns("c\n\nd", "e")]},
    ),
    "Alpaca with empty history and system": (
        {"instruction": "Hi", "output": "Hello", "system": "", "history": None},
        {"messages": CHAT},
    ),
    "instruction, input, response": (
        {"instruction": "a", "input": "b", "response": "c"},
        {"prompt": "a\n\nb", "response": "c"},
    ),
    "instruction, context, output": (
        {"instruction": "a", "context": "b", "output": "c"},
        {"prompt": "a\n\nb", "response": "c"},
    ),
    "input and output": ({"input": "a", "output": "b"}, {"prompt": "a", "response": "b"}),
    "MetaMath": ({"query": "a", "response": "b", "original_question": "c"}, {"prompt": "a", "response": "b"}),
    "OpenOrca": (
        {"system_prompt": "Be", "question": "Hi", "response": "Hello"},
        {"messages": [BE, *CHAT]},
    ),
    "SQuAD": (
        {"context": "a", "question": "b?", "answers": {"text": ["c", "d"], "answer_start": [0, 2]}},
        {"prompt": "a\n\nb?", "response": "c"},
    ),
    "SQuAD without an answer": (
        {"context": "a", "question": "b?", "answers": {"text": [], "answer_start": []}},
        {"prompt": "a\n\nb?", "response": ""},
    ),
    "SQuAD's file": (
        {"context": "a", "question": "b?", "answers": [{"text": "c", "answer_start": 0}]},
        {"prompt": "a\n\nb?", "response": "c"},
    ),
    "TRL, conversational": (
        {"prompt": [BE, *CHAT, CHAT[0]], "completion": CHAT[1:]},
        {"messages": [BE, CHAT[0], {**CHAT[1], "fields": '{"weight": 0}'}, *CHAT]},
    ),
    "TRL, conversational, with tools": (
        {"prompt": CHAT[:1], "completion": CHAT[1], "tools": [{"name": "f"}]},
        {"messages": CHAT, "tools": '[{"name": "f"}]'},
    ),
}


@pytest.mark.parametrize(("row", "document"), SHAPES.values(), ids=list(SHAPES))
def test_a_documented_shape_is_recognised(row: dict[str, Any], document: dict[str, Any]) -> None:
    assert recognize_schema(row, "a file").to_document(row) == document


REFUSED = {
    "unknown columns": (["grade", "golden"], "which fit no known format"),
    "no columns": ([], "nothing, which fit no known format"),
    "a text beside an instruction": (["instruction", "text", "decoded"], "more than one format"),
    "two responses": (["prompt", "response", "answer"], "more than one format"),
    "a prompt alone": (["prompt"], "which fit no known format"),
    "a preference set": (["prompt", "chosen", "rejected"], "as preference data has"),
    "a chat preference set": (["conversations", "chosen", "rejected"], "as preference data has"),
    "a chat with a verdict": (["messages", "label"], "as preference data has"),
    "a pair with a verdict": (["prompt", "completion", "label"], "as preference data has"),
}


@pytest.mark.parametrize(("columns", "says"), REFUSED.values(), ids=list(REFUSED))
def test_other_columns_are_refused_with_what_was_found(columns: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        recognize_schema(dict.fromkeys(columns), "rows.csv")
    assert all(name in str(caught.value) for name in {*columns} & {"chosen", "grade", "label", "decoded"})


def test_the_refusal_names_every_accepted_shape() -> None:
    with pytest.raises(DataError) as caught:
        recognize_schema({"x": ""}, "rows.csv")
    assert ACCEPTED_COLUMNS in str(caught.value)


def test_the_caller_may_say_which_column_is_which() -> None:
    row = {"instruction": "a", "text": "b", "decoded": "c", "turns": CHAT}
    assert recognize_schema(row, "f", columns={"prompt": "instruction", "response": "decoded"}).to_document(row) == {
        "prompt": "a",
        "response": "c",
    }
    assert recognize_schema(row, "f", columns={"text": "text"}).to_document(row) == {"text": "b", "whole": True}
    assert recognize_schema(row, "f", columns={"messages": "turns"}).to_document(row) == {"messages": CHAT}


def test_columns_that_are_not_there_or_mean_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no column `body`; it has `text`"):
        recognize_schema({"text": ""}, "rows.csv", columns={"text": "body"})
    with pytest.raises(UsageError, match="`prompt` do not define a document"):
        recognize_schema({"text": ""}, "rows.csv", columns={"prompt": "text"})


MALFORMED = {
    "a missing column": ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, "lacks `completion`"),
    "a number for text": ({"text": "a"}, {"text": 3}, "has int in `text`"),
    "half a surrogate pair": ({"text": "a"}, {"text": "\ud800"}, "half a surrogate pair"),
    "an unknown role": ({"messages": []}, {"messages": [{"role": "narrator", "content": "a"}]}, "role 'narrator'"),
    "a role that is no string": ({"messages": []}, {"messages": [{"role": ["a"], "content": "a"}]}, "role"),
    "a turn without content": ({"messages": []}, {"messages": [{"role": "user"}]}, "needs role and content"),
    "a turn that is a string": ({"messages": []}, {"messages": ["Hi"]}, "a turn with str"),
    "a chat that is a string": ({"messages": []}, {"messages": "Hi"}, "has str in `messages`"),
    "an image": (
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]},
        "a part of the type 'image_url' in `content`",
    ),
    "a history that is no list of pairs": (
        {"instruction": "a", "output": "b", "history": []},
        {"instruction": "a", "output": "b", "history": [["x"]]},
        r"not \[question, answer\]",
    ),
    "a system prompt that comes late": (
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": "b", "system": "Be brief"},
        "has `system`, which the first rows lack",
    ),
    "calls of tools": (
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "tool_calls",
    ),
}


@pytest.mark.parametrize(("first", "row", "says"), MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_row_says_what_is_wrong(first: dict[str, Any], row: dict[str, Any], says: str) -> None:
    with pytest.raises(MalformedRow, match=says):
        recognize_schema(first, "f").to_document(row)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"text": "a"}, None),
        ({"text": " \n"}, "empty text"),
        ({"prompt": "", "response": "b"}, "empty prompt"),
        ({"prompt": "a", "response": " "}, "empty response"),
        ({"messages": CHAT}, None),
        ({"messages": CHAT[:1]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "an empty answer"),
    ],
)
def test_what_cannot_be_trained_on_has_a_reason(document: dict[str, Any], reason: str | None) -> None:
    assert find_lack(document) == reason


def test_a_missing_column_in_a_later_row_is_no_empty_one() -> None:
    shape = recognize_schema({"text": ""}, "f")
    assert shape.to_document({"text": None}) == {"text": "", "whole": True}
    with pytest.raises(MalformedRow):
        shape.to_document({"body": "a"})


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([CHAT[0], {"role": "assistant", "content": None}], "a turn without content"),
        ([{"role": "user", "content": None}, CHAT[1]], "a turn without content"),
        ([{"from": "human", "value": None}, CHAT[1]], "a turn without content"),
    ],
)
def test_a_turn_whose_content_is_null_is_no_empty_answer(messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UntrainableRow, match=says):
        recognize_schema({"messages": []}, "f").to_document({"messages": messages})


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"loss_weight": 0.0}])
def test_an_answer_that_is_marked_is_context_and_a_row_of_such_answers_is_left_out(mark: dict[str, Any]) -> None:
    schema = recognize_schema({"messages": []}, "f")
    marked = {**CHAT[1], **mark}
    assert find_lack(schema.to_document({"messages": [CHAT[0], marked, *CHAT]})) is None
    assert find_lack(schema.to_document({"messages": [CHAT[0], {**marked, "content": ""}, *CHAT]})) is None
    only = schema.to_document({"messages": [CHAT[0], marked]})
    assert find_lack(only) == "no assistant turn of a weight above 0"


def test_the_caller_may_name_a_system_prompt_a_context_and_a_history() -> None:
    row = {"q": "Hi", "a": "Hello", "c": "World", "s": "Be", "h": [["Hi", "Hello"]], "system": "not stated"}
    stated = {"prompt": "q", "response": "a"}
    assert recognize_schema(row, "f", columns=stated).to_document(row) == {"prompt": "Hi", "response": "Hello"}
    stated |= {"context": "c", "system": "s", "history": "h"}
    expected = {"messages": [BE, *CHAT, *turns("Hi\n\nWorld", "Hello")]}
    assert recognize_schema(row, "f", columns=stated).to_document(row) == expected
    with pytest.raises(UsageError, match="and context, system, history"):
        recognize_schema(row, "f", columns={"prompt": "q", "response": "a", "tools": "c"})


def test_an_input_that_comes_after_the_first_rows_belongs_to_its_prompt() -> None:
    rows = [{"instruction": "Sum", "output": "3"}] * 300 + [{"instruction": "Sum", "input": "1 2", "output": "3"}]
    reader = RowReader()
    documents = list(reader.read_documents((Record(row, "row") for row in rows), source="rows"))
    assert [document["prompt"] for document in documents[-2:]] == ["Sum", "Sum\n\n1 2"]
    assert not reader.unread_text


def test_a_system_prompt_that_comes_after_the_first_rows_belongs_to_its_chat() -> None:
    rows: list[dict[str, Any]] = [{"messages": CHAT}] * 300 + [{"messages": CHAT, "system": "Be"}]
    (*_, last) = RowReader().read_documents((Record(row, "row") for row in rows), source="rows")
    assert last["messages"] == [BE, *CHAT]
