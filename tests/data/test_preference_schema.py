"""Every format of preferences gives the same turns, and a row that teaches nothing has a reason."""

from typing import Any

import pytest

from potstill.core.errors import DataError, UsageError
from potstill.data.preference_schema import (
    ACCEPTED_PREFERENCES,
    is_preference_row,
    recognize_any,
    recognize_preferences,
)
from potstill.data.preferences import Preference, preference
from potstill.data.transcript import read_transcript
from potstill.data.turns import MalformedRow, UntrainableRow


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
HI, GOOD, BAD = user("Hi"), assistant("Hello."), assistant("No.")
PAIR = Preference([HI], [GOOD], [BAD])
SYSTEM_PAIR = Preference([SYSTEM, HI], [GOOD], [BAD])
LONG_PAIR = Preference([HI, GOOD, user("Sum 1 2")], [assistant("3")], [assistant("4")])
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Sum 1 2\n\nAssistant:"

FORMATS: dict[str, tuple[dict[str, Any], Preference]] = {
    "TRL, explicit texts": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, PAIR),
    "TRL, explicit messages": ({"prompt": [HI], "chosen": [GOOD], "rejected": [BAD]}, PAIR),
    "TRL, explicit with a system prompt": ({"prompt": [SYSTEM, HI], "chosen": [GOOD], "rejected": [BAD]}, SYSTEM_PAIR),
    "TRL, explicit with answers in its prompt": (
        {"prompt": LONG_PAIR.prompt, "chosen": LONG_PAIR.chosen, "rejected": LONG_PAIR.rejected},
        LONG_PAIR,
    ),
    "TRL, implicit": ({"chosen": [HI, GOOD], "rejected": [HI, BAD]}, PAIR),
    "TRL, implicit with a system prompt": (
        {"chosen": [SYSTEM, HI, GOOD], "rejected": [SYSTEM, HI, BAD]},
        SYSTEM_PAIR,
    ),
    "LLaMA-Factory, turns": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        PAIR,
    ),
    "LLaMA-Factory, turns with a system column": (
        {"conversations": [HI], "chosen": GOOD, "rejected": BAD, "system": "Be brief."},
        SYSTEM_PAIR,
    ),
    "LLaMA-Factory, instruction and input": (
        {"instruction": "Sum", "input": "1 2", "chosen": "3", "rejected": "4"},
        Preference([user("Sum\n\n1 2")], [assistant("3")], [assistant("4")]),
    ),
    "LLaMA-Factory, history": (
        {"instruction": "Sum 1 2", "input": "", "history": [["Hi", "Hello."]], "chosen": "3", "rejected": "4"},
        LONG_PAIR,
    ),
    "HH-RLHF": ({"chosen": f"{HH} 3", "rejected": f"{HH} 4"}, LONG_PAIR),
    "HH-RLHF with a prompt": ({"prompt": HH, "chosen": " 3", "rejected": " 4"}, LONG_PAIR._replace(
        chosen=[assistant(" 3")], rejected=[assistant(" 4")]
    )),
    "UltraFeedback, binarized": (
        {"prompt": "Hi", "prompt_id": "7", "messages": [HI, GOOD], "chosen": [HI, GOOD], "rejected": [HI, BAD],
         "score_chosen": 8.0, "score_rejected": 2.0},
        PAIR,
    ),
    "UltraFeedback": (
        {"instruction": "Hi", "completions": [
            {"response": "Hm.", "overall_score": 5.0}, {"response": "Hello.", "overall_score": 9.0},
            {"response": "No.", "overall_score": 1.0},
        ]},
        PAIR,
    ),
    "Orca": ({"system": "Be brief.", "question": "Hi", "chosen": "Hello.", "rejected": "No."}, SYSTEM_PAIR),
    "distilabel": ({"system": "Be brief.", "input": "Hi", "chosen": "Hello.", "rejected": "No."}, SYSTEM_PAIR),
    "a system prompt of the row beside whole chats": (
        {"system": "Be brief.", "chosen": [HI, GOOD], "rejected": [HI, BAD]},
        SYSTEM_PAIR,
    ),
    "KTO, texts": ({"prompt": "Hi", "completion": "Hello.", "label": True}, Preference([HI], [GOOD], [], True)),
    "KTO, messages": ({"prompt": [HI], "completion": [BAD], "label": False}, Preference([HI], [], [BAD], False)),
    "KTO of LLaMA-Factory": ({"messages": [HI, BAD], "label": False}, Preference([HI], [], [BAD], False)),
    "KTO of LLaMA-Factory, as documented": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "kto_tag": "true"},
        Preference([HI], [GOOD], [], True),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), FORMATS.values(), ids=list(FORMATS))
def test_a_documented_format_gives_its_prompt_and_its_answers(row: dict[str, Any], expected: Preference) -> None:
    assert preference(row) == expected
    assert is_preference_row(row)


def test_the_prompt_is_what_both_sides_have_in_common_turn_by_turn() -> None:
    turns = [HI, GOOD, user("Why?")]
    last_turn = preference({"chosen": [*turns, assistant("So.")], "rejected": [*turns, assistant("Hm.")]})
    assert last_turn == Preference(turns, [assistant("So.")], [assistant("Hm.")])
    early = preference({"chosen": [HI, GOOD, user("Why?"), GOOD], "rejected": [HI, BAD, user("Why?"), GOOD]})
    assert early == Preference([HI], [GOOD, user("Why?"), GOOD], [BAD, user("Why?"), GOOD])


def test_sides_may_have_different_numbers_of_turns() -> None:
    longer = [HI, GOOD, user("Why?"), assistant("So.")]
    assert preference({"chosen": [HI, BAD], "rejected": longer}) == Preference([HI], [BAD], longer[1:])
    assert preference({"chosen": longer, "rejected": [HI, GOOD]}) == Preference([HI], longer[1:], [GOOD])


def test_weights_of_answers_do_not_matter_since_only_the_last_is_trained() -> None:
    marked = {**GOOD, "weight": 0}
    assert preference({"prompt": [HI], "chosen": [marked], "rejected": [BAD]}) == PAIR
    assert preference({"messages": [HI, marked], "label": 1}) == Preference([HI], [GOOD], [], True)


def test_a_transcript_is_split_at_its_speakers_alone() -> None:
    text = "\n\nHuman: Who says Human: here?\n\nHuman: Two\nlines\n\nAssistant:  Nobody. "
    assert read_transcript(text) == [user("Who says Human: here?"), user("Two\nlines"), assistant("Nobody.")]
    assert read_transcript("\n\nHuman: Hi\n\nAssistant:", has_answer=False) == [HI]


NOTHING: dict[str, tuple[dict[str, Any], str]] = {
    "equal sides": ({"prompt": "Hi", "chosen": "Hello.", "rejected": "Hello."}, "equal sides"),
    "an empty answer": ({"prompt": "Hi", "chosen": "Hello.", "rejected": " \n"}, "an empty answer"),
    "an empty answer in a transcript": ({"chosen": f"{HH} 3", "rejected": HH}, "an empty answer"),
    "an empty prompt": ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
    "a side that ends with a question": ({"chosen": [HI, GOOD], "rejected": [HI, GOOD, HI]}, "does not end with"),
    "different questions": ({"chosen": [HI, GOOD], "rejected": [user("Ho"), GOOD]}, "no prompt that both"),
    "a system prompt alone in common": ({"chosen": [SYSTEM, HI, GOOD], "rejected": [SYSTEM, GOOD]}, "no prompt"),
    "answers without a prompt": ({"chosen": "a", "rejected": "b"}, "no prompt that both sides share"),
    "a null": ({"prompt": "Hi", "chosen": "a", "rejected": None}, "a turn without content"),
    "equal scores": (
        {"instruction": "Hi", "completions": [{"response": r, "score": 1} for r in "ab"]},
        "answers of equal scores",
    ),
}


@pytest.mark.parametrize(("row", "reason"), NOTHING.values(), ids=list(NOTHING))
def test_a_row_that_teaches_nothing_has_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UntrainableRow, match=reason):
        recognize_preferences(row, "f").to_document(row)
    with pytest.raises(DataError, match=f"the row has .*{reason}"):
        preference(row)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "a chat of another prompt": ({"prompt": "Ho", "chosen": [HI, GOOD], "rejected": [HI, BAD]}, "not begin with its"),
    "an answer after an answer": ({"messages": [HI, GOOD], "chosen": "a", "rejected": "b"}, "ends with an answer"),
    "a number for an answer": ({"prompt": "Hi", "chosen": 3, "rejected": "b"}, "int in `content`"),
    "a label that is a word": ({"messages": [HI, GOOD], "label": "good"}, "'good' in `label`"),
    "no label": ({"messages": [HI, GOOD], "label": None}, "None in `label`"),
    "completions without scores": ({"prompt": "Hi", "completions": [{"response": "a"}]}, "without a response and a"),
}


@pytest.mark.parametrize(("row", "text"), MALFORMED.values(), ids=list(MALFORMED))
def test_a_malformed_row_names_what_is_wrong(row: dict[str, Any], text: str) -> None:
    with pytest.raises(MalformedRow, match=text):
        recognize_preferences(row, "f").to_document(row)
    with pytest.raises(DataError, match=text):
        preference(row)


@pytest.mark.parametrize("columns", [["text"], ["prompt", "response"], ["messages"], ["chosen"], ["text", "label"], []])
def test_an_unknown_format_names_its_columns_and_the_accepted_formats(columns: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        recognize_preferences(dict.fromkeys(columns, "a"), "rows.jsonl")
    assert ACCEPTED_PREFERENCES in str(caught.value)
    assert all(f"`{name}`" in str(caught.value) for name in columns)
    assert not is_preference_row(dict.fromkeys(columns, "a"))


def test_the_caller_may_name_the_columns() -> None:
    row = {"q": "Hi", "good": "Hello.", "bad": "No.", "s": "Be brief.", "verdict": "0"}
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert preference(row, columns=pair) == PAIR
    assert preference(row, columns={**pair, "system": "s"}) == SYSTEM_PAIR
    labeled = {"prompt": "q", "completion": "bad", "label": "verdict"}
    assert preference(row, columns=labeled) == Preference([HI], [], [BAD], False)
    assert recognize_preferences(row, "f", columns=pair).columns == ("q", "good", "bad")
    with pytest.raises(UsageError, match="do not define a preference"):
        preference(row, columns={**pair, "better": "good"})
    with pytest.raises(DataError, match="has no column `worse`"):
        preference(row, columns={**pair, "rejected": "worse"})


def test_rows_of_any_kind_are_recognized_beside_each_other() -> None:
    assert recognize_any({"prompt": "a", "chosen": "b", "rejected": "c"}, "f").kind == "preferences"
    assert recognize_any({"prompt": "a", "response": "b"}, "f").kind == "pairs"
    assert recognize_any({"text": "a", "label": 1}, "f").kind == "text"
    assert recognize_any({"a": "b"}, "f", columns={"text": "a"}).kind == "text"
