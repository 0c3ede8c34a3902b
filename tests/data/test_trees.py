"""Rows that are no documents become rows that are: trees of messages, and articles with questions."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from potstill.data import hub
from potstill.data.corpus import load_corpus
from potstill.data.row_reader import Route
from potstill.data.turns import to_messages

Lines = Callable[..., Path]


def message(name: str, parent: str | None, text: str, **others: Any) -> dict[str, Any]:
    role = "assistant" if name.startswith("a") else "prompter"
    marks = {"lang": "en", "rank": None, "deleted": False, "review_result": None}
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, **marks, **others}


MESSAGES = [
    message("p1", None, "Hi"),
    message("a1", "p1", "worse", rank=1),
    message("a2", "p1", "best", rank=0),
    message("a3", "p1", "deleted", rank=-1, deleted=True),
    message("p2", "a2", "And?"),
    message("a4", "p2", "first"),
    message("a5", "p2", "rejected", rank=0, review_result=False),
    message("p3", "a4", "no answer"),
    message("p9", None, "Alone"),
    message("a9", "gone", "an orphan"),
]
BEST = ["Hi", "best", "And?", "first", "no answer"]


def nest(name: str) -> dict[str, Any]:
    row = next(row for row in MESSAGES if row["message_id"] == name)
    return {**row, "replies": [nest(child["message_id"]) for child in MESSAGES if child["parent_id"] == name]}


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_the_best_path_of_a_tree_of_messages_is_a_chat(lines: Lines, nested: bool) -> None:
    trees = [{"message_tree_id": name, "tree_state": "ready", "prompt": nest(name)} for name in ("p1", "p9")]
    corpus = load_corpus(lines(trees if nested else MESSAGES), split="all")
    (chat,) = corpus.documents
    assert [turn["content"] for turn in to_messages(chat)] == BEST
    assert {turn["role"] for turn in to_messages(chat)} == {"user", "assistant"}
    assert corpus.drop_counts == {
        "a place beside the best path of its tree": 3 if nested else 4,
        "no assistant turn": 1,
    }


def test_a_tree_keeps_the_columns_of_its_first_message(lines: Lines) -> None:
    corpus = load_corpus(lines(MESSAGES), split="all", label=Route("lang", ("de", "en")))
    assert list(corpus.documents["route"]) == [1]


def test_every_question_on_a_paragraph_of_squad_is_a_pair(tmp_path: Path) -> None:
    answers = [{"text": "1849", "answer_start": 3}, {"text": "in 1849", "answer_start": 0}]
    questions = [{"question": "When?", "answers": answers, "id": "1"}, {"question": "Why?", "answers": [], "id": "2"}]
    article = {"title": "A", "paragraphs": [{"context": "In 1849 it began.", "qas": questions}]}
    (tmp_path / "squad.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    corpus = load_corpus(tmp_path / "squad.json", split="all")
    assert list(corpus.documents) == [{"prompt": "In 1849 it began.\n\nWhen?", "response": "1849"}]
    assert corpus.drop_counts == {"empty response": 1}


def test_columns_with_text_that_are_not_read_are_named(lines: Lines) -> None:
    rows = [{"question": "a", "answer": "b", "rationale": "c", "id": 3, "note": " "}]
    corpus = load_corpus(lines(rows), split="all")
    assert corpus.provenance["unread_text"] == ["rationale"]
    assert corpus.provenance["unread_columns"] == ["id", "note", "rationale"]


def test_a_system_prompt_that_only_some_rows_have_is_read(lines: Lines) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d", "system": "Be brief."}]
    corpus = load_corpus(lines(rows), split="all")
    assert sorted(len(document["messages"]) for document in corpus.documents) == [2, 3]


class HubOfRows:
    """A data set of the hub whose splits are given here, streamed."""

    revision, license, is_offline = "a1", "apache-2.0", False
    splits: Mapping[str, Sequence[Mapping[str, Any]]] = {}

    def __init__(self, name: str) -> None:
        self.name = name

    def list_splits(self) -> list[str]:
        return list(self.splits)

    def load_rows(self, split: str) -> datasets.IterableDataset:
        return datasets.Dataset.from_list([dict(row) for row in self.splits[split]]).to_iterable_dataset()


def test_trees_of_the_hub_are_read_whole_and_its_test_split_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HubDataset", HubOfRows)
    replied = [message("p7", None, "Why?"), message("a7", "p7", "So.")]
    monkeypatch.setattr(HubOfRows, "splits", {"main": MESSAGES, "test": replied})
    train, held_out = (load_corpus("nobody/trees", split=split) for split in ("train", "validation"))
    assert [turn["content"] for turn in to_messages(train.documents[0])] == BEST
    assert [turn["content"] for turn in to_messages(held_out.documents[0])] == ["Why?", "So."]
    assert (train.provenance["held_out"], train.digest is None) == (["test"], False)
