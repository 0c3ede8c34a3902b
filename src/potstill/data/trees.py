"""Turns rows that are no documents into rows that are: OASST's trees of messages, and SQuAD's articles.

OASST stores a message in each row, with the ids of itself and of its parent, or a whole tree in each row. Of a tree the
best path becomes a chat: at each message the reply of the lowest `rank` follows, or the first one without ranks. So no
turn is trained on twice. Deleted messages, and those that reviewers rejected, are left out with their replies.

SQuAD's JSON stores an article in each row, with paragraphs, and questions with answers on each.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from potstill.data.files import Record

TREE_COLUMNS = frozenset({"message_id", "parent_id", "role", "text"})
OTHER_BRANCH = "a place beside the best path of its tree"  # why a message is left out
Node = Mapping[str, Any]


def is_message_row(row: Mapping[str, Any]) -> bool:
    """Whether a row is one message of a tree, which other rows complete."""
    return set(row) >= TREE_COLUMNS


def join_rows(rows: Iterable[Record], drop_counts: Counter[str]) -> Iterator[Record]:
    """`rows`, or the documents' rows that they make up. Adds to `drop_counts` the messages beside the best paths."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    rows = chain([first], rows)
    if is_message_row(first.row):
        yield from _join_messages(list(rows), drop_counts)
    elif _is_tree(first.row):
        yield from (_flatten_tree(record, drop_counts) for record in rows)
    elif isinstance(first.row.get("paragraphs"), list):
        yield from chain.from_iterable(map(_list_questions, rows))
    else:
        yield from rows


def _is_tree(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("prompt"), Mapping) and "text" in row["prompt"] and "role" in row["prompt"]


def _join_messages(records: Sequence[Record], drop_counts: Counter[str]) -> Iterator[Record]:
    replies: dict[Any, list[Node]] = defaultdict(list)
    for row, _ in records:
        if row.get("parent_id"):
            replies[row["parent_id"]].append(row)
    num_used = 0
    for row, location in records:
        if not row.get("parent_id") and _is_accepted(row):
            path = find_best_path(row, lambda node: replies.pop(node.get("message_id"), []))
            num_used += len(path)
            yield _make_chat(row, path, location)
    drop_counts[OTHER_BRANCH] += len(records) - num_used


def _flatten_tree(record: Record, drop_counts: Counter[str]) -> Record:
    row, location = record
    if not _is_tree(row):
        return record
    path = find_best_path(row["prompt"], lambda node: node.get("replies") or [])
    drop_counts[OTHER_BRANCH] += _count_nodes(row["prompt"]) - len(path)
    return _make_chat({name: value for name, value in row.items() if name != "prompt"}, path, location)


def find_best_path(root: Node, list_replies: Callable[[Node], Sequence[Node]]) -> list[Node]:
    """The messages from `root` to a leaf, each the reply of the lowest rank to the one before it."""
    path = [root]
    while replies := [reply for reply in list_replies(path[-1]) if _is_accepted(reply)]:
        path.append(min(replies, key=_get_rank))
    return path


def _get_rank(node: Node) -> float:
    return float("inf") if node.get("rank") is None else float(node["rank"])


def _is_accepted(node: Node) -> bool:
    return not node.get("deleted") and node.get("review_result") is not False


def _count_nodes(node: Node) -> int:
    return 1 + sum(map(_count_nodes, node.get("replies") or []))


def _make_chat(row: Mapping[str, Any], path: Sequence[Node], location: str) -> Record:
    messages = [{"role": node["role"], "content": node["text"]} for node in path]
    columns = {name: value for name, value in row.items() if name not in TREE_COLUMNS}
    return Record({**columns, "messages": messages}, location)


def _list_questions(record: Record) -> Iterator[Record]:
    row, location = record
    for paragraph in row.get("paragraphs") or []:
        for question in paragraph.get("qas") or []:
            yield Record({"context": paragraph.get("context"), **question}, location)
