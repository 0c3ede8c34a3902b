"""Cuts a document that is longer than a pack into windows, each a document of its own.

A text is cut end to end. A further window begins with the last token of the window before it, so that every label is
trained on exactly once.

A chat is cut by its answers, so that each keeps its prompt:

- The first window holds all answers that fit whole from the start of the chat.
- A later window begins as the chat does, up to the words of the first user turn, system prompt included. Then come as
  many of the preceding turns as fit, and an answer. If not even the last turn fits, the end of that turn stays.
- Answers before it that are not trained yet belong to this window too, if each keeps half a window of what precedes it,
  or all that a window of its own would hold. Without that, each short turn of a long chat would cost a whole window.
- An answer that leaves less than a sixteenth of the window to its prompt is cut at its end, so its stop token is not
  trained on. Its prompt then has at most half of the window.

The beginning stays if the last turn fits beside it, or if it takes at most half of the room beside the answer. No label
is lost but those of a cut end, and none is repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from potstill.core.types import IGNORE
from potstill.data.pack_fields import GROUPS, get_field, to_array
from potstill.data.token_dataset import TokenizedDocument

SHORTENED_SHARE = 0.05  # of documents; above it a larger context is advised
MIN_PROMPT_DIVISOR = 16  # a sixteenth of a window is for the prompt, or all of a shorter one
COVERED_PERCENTILE = 99  # of documents that the advised context holds whole


class DocumentWindow(NamedTuple):
    """The tokens, labels and fields of a document or of a window of it.

    `is_shortened` if tokens before its answer are missing; `is_cut` if the end of its answer is.
    """

    input_ids: Int32[np.ndarray, " _"]
    labels: Int32[np.ndarray, " _"]
    fields: Mapping[str, np.ndarray] = {}
    is_shortened: bool = False
    is_cut: bool = False

    @property
    def group(self) -> int:
        """The number of the group that the document belongs to, or -1."""
        return int(self.fields[GROUPS.name]) if GROUPS.name in self.fields else -1

    @property
    def is_trained(self) -> bool:
        """Whether any token has a label or another target."""
        return bool((self.labels != IGNORE).any()) or any(
            bool((values != get_field(name).fill).any())
            for name, values in self.fields.items()
            if get_field(name).target
        )


@dataclass(frozen=True)
class WindowCounts:
    """What became of `documents` in packs of at most `context` tokens.

    `split` texts are cut end to end into several windows. `shortened` chats hold an answer without all that precedes
    it, and `cut` chats one without its end. `dropped` windows hold no token to train on or were refused, and
    `dropped_groups` groups did not fit. `longest` is the 99th percentile of the documents' lengths in tokens.
    """

    context: int
    documents: int = 0
    split: int = 0
    shortened: int = 0
    cut: int = 0
    dropped: int = 0
    dropped_groups: int = 0
    longest: int = 0

    @property
    def needs_warning(self) -> bool:
        """Whether more than 5 % of the documents are shortened or cut."""
        return self.shortened + self.cut > SHORTENED_SHARE * self.documents

    def to_dict(self) -> dict[str, int]:
        """The counts that are not zero, for a card."""
        counts = {name: getattr(self, name) for name in ("split", "shortened", "cut", "dropped", "dropped_groups")}
        counts = {name: count for name, count in counts.items() if count}
        return {"documents": self.documents, **counts, **({"longest": self.longest} if counts else {})}


def count_windows(
    documents: Sequence[Sequence[DocumentWindow]], lengths: Sequence[int], *, context: int, dropped: int, groups: int
) -> WindowCounts:
    """The counts of documents of these lengths, given all windows of each."""
    cut = [any(window.is_cut for window in windows) for windows in documents]
    shortened = [any(window.is_shortened for window in windows) for windows in documents]
    is_chat = [any(pair) for pair in zip(cut, shortened, strict=True)]
    return WindowCounts(
        context=context,
        documents=len(documents),
        split=sum(len(windows) > 1 and not lossy for windows, lossy in zip(documents, is_chat, strict=True)),
        shortened=sum(short and not ended for short, ended in zip(shortened, cut, strict=True)),
        cut=sum(cut),
        dropped=dropped,
        dropped_groups=groups,
        longest=int(np.percentile(lengths, COVERED_PERCENTILE, method="higher")) if lengths else 0,
    )


def describe_loss(counts: WindowCounts) -> list[str]:
    """What chats lost to the context, as sentences; above 5 % with the context that holds 99 % of them."""
    sentences = []
    losses = [
        f"{number:,} lost {part}"
        for number, part in (
            (counts.shortened, "the beginning of what precedes an answer"),
            (counts.cut, "the end of an answer"),
        )
        if number
    ]
    if losses:
        sentences.append(f"of {counts.documents:,} documents, {' and '.join(losses)}, to --context {counts.context}")
    if counts.needs_warning:
        share = (counts.shortened + counts.cut) / counts.documents
        sentences.append(
            f"{share:.0%} of the documents do not fit into --context {counts.context}; --context {counts.longest} "
            f"holds {COVERED_PERCENTILE} % of them whole"
        )
    return sentences


def cut_windows(row: TokenizedDocument, *, length: int, bos: int | None = None) -> list[DocumentWindow]:
    """Cuts a document into windows of at most `length` tokens.

    Each window holds the fields of its document. With `bos`, each further window begins with it. At a BOS that is
    added, fields per token hold their fill value.
    """
    ids, labels = np.array(row.input_ids, dtype=np.int32), np.array(row.labels, dtype=np.int32)
    labels[:1] = IGNORE
    fields = {name: to_array(name, value, len(ids)) for name, value in row.fields.items()}
    answers = find_answers(labels)
    if row.turn_starts is None or not answers or len(ids) <= length:
        spans = _plan_text(len(ids), length, has_bos=bos is not None)
    else:
        has_bos = bos is not None and int(ids[0]) == bos
        spans = _plan_chat(answers, row.turn_starts, length, has_bos=has_bos)
    return [_make_window(ids, labels, fields, span, bos) for span in spans]


class _WindowPlan(NamedTuple):
    """The positions of a window's tokens in its document, -1 for a BOS, and the first one that is not mere context."""

    positions: Int64[np.ndarray, " _"]
    first_new: int
    is_shortened: bool = False
    is_cut: bool = False


def find_answers(labels: Int32[np.ndarray, " T"]) -> list[tuple[int, int]]:
    """The maximal runs of labels, as (start, stop)."""
    is_trained = np.concatenate([[False], labels != IGNORE, [False]])
    bounds = np.flatnonzero(is_trained[1:] != is_trained[:-1]).tolist()
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _plan_text(num_tokens: int, length: int, *, has_bos: bool) -> list[_WindowPlan]:
    added = np.full(int(has_bos), -1)
    step = length - len(added) - 1
    return [
        _WindowPlan(np.arange(min(length, num_tokens)), 0),
        *(
            _WindowPlan(np.concatenate([added, np.arange(start - 1, min(start + step, num_tokens))]), start)
            for start in range(length, num_tokens, step)
        ),
    ]


def _plan_chat(
    answers: Sequence[tuple[int, int]], turn_starts: Sequence[int], length: int, *, has_bos: bool
) -> list[_WindowPlan]:
    num_whole = sum(stop <= length for _, stop in answers)
    plans = [_WindowPlan(np.arange(answers[num_whole - 1][1]), 0)] if num_whole else []
    bounds = [0, *(stop for _, stop in answers)]
    has_header = bool(turn_starts) and turn_starts[0] <= answers[0][0]
    header = max(turn_starts[0] if has_header else 0, int(has_bos))
    plans_of_one = [
        _plan_answer(answers[i], bounds[i], turn_starts, header, length, has_bos=has_bos)
        for i in range(num_whole, len(answers))
    ]
    starts = [start for start, _ in answers[num_whole:]]
    return plans + _merge_plans(plans_of_one, starts, min_context=length // 2)


def _merge_plans(plans: Sequence[_WindowPlan], starts: Sequence[int], *, min_context: int) -> list[_WindowPlan]:
    """The windows of successive answers, given that of each alone and where the answers start.

    An answer moves into the window of a later one that holds `min_context` tokens before it, or as many as its own.
    """
    merged: list[_WindowPlan] = []
    first = 0  # the answer with which the last window begins
    for number, plan in enumerate(plans):
        if merged:
            alone, shared = (int(np.searchsorted(p.positions, starts[first])) for p in (plans[first], plan))
            has_prompt = starts[first] - 1 in plan.positions
            if has_prompt and shared >= min(alone, min_context):
                merged[-1] = plan._replace(first_new=plans[first].first_new)
                continue
        merged.append(plan)
        first = number
    return merged


def _plan_answer(
    answer: tuple[int, int], previous_stop: int, turn_starts: Sequence[int], header: int, length: int, *, has_bos: bool
) -> _WindowPlan:
    """The window of one answer; `header` tokens begin the chat, and the answer before it ends at `previous_stop`."""
    start, stop = answer
    size = stop - start
    has_room = length - size >= min(start, max(1, length // MIN_PROMPT_DIVISOR))
    room = length - size if has_room else min(start, length // 2)
    starts = [t for t in turn_starts if header <= t < start]
    own_turn = max([*starts[-1:], previous_stop, header])
    if header + start - own_turn > room and 2 * header > room:
        header = min(int(has_bos), room - 1)
    first = min((t for t in starts if start - t <= room - header), default=max(header, start - room + header))
    stop = min(stop, start + length - header - (start - first))
    positions = np.concatenate([np.arange(header), np.arange(first, stop)])
    return _WindowPlan(positions, previous_stop, is_shortened=first > header, is_cut=stop < answer[1])


def _make_window(
    ids: Int32[np.ndarray, " T"],
    labels: Int32[np.ndarray, " T"],
    fields: Mapping[str, Any],
    plan: _WindowPlan,
    bos: int | None,
) -> DocumentWindow:
    """A window with its fields. Labels and targets of mere context are not trained on again."""
    is_added, is_new = plan.positions < 0, plan.positions >= plan.first_new
    window_fields = {}
    for name, values in fields.items():
        declaration = get_field(name)
        if declaration.per == "token":
            is_filled = is_added | ~is_new if declaration.target else is_added
            values = np.where(is_filled, np.array(declaration.fill, dtype=values.dtype), values[plan.positions])
        window_fields[name] = values
    return DocumentWindow(
        np.where(is_added, np.int32(0 if bos is None else bos), ids[plan.positions]),
        np.where(is_new, labels[plan.positions], np.int32(IGNORE)),
        window_fields,
        plan.is_shortened,
        plan.is_cut,
    )
