"""Translates a chat from the student's template to the teacher's: the same turns between the teacher's markers.

The text that a template writes between two turns depends on their roles alone. It is found by rendering a few chats:

    from and to         SmolLM2                               Gemma 3
    start, user         (its own system message) ...user\\n    <bos><start_of_turn>user\\n
    user, assistant     <|im_end|>\\n<|im_start|>assistant\\n   <end_of_turn>\\n<start_of_turn>model\\n
    assistant, end      <|im_end|>\\n                          <end_of_turn>\\n

So a window of the student's tokens is split into turns, wherever it was cut, and rendered with the teacher's markers.
Further edits of a template (trimming, merging turns) are not imitated. The turns stay those of the student's text, byte
for byte, since only equal bytes can be compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import AnyStr, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import DataError
from potstill.data.chat_template import ChatTemplate
from potstill.data.cross_tokenizer.token_spans import decode_with_spans, to_readable_text
from potstill.models.tokenizers.token_bytes import TokenBytes

START, END, UNKNOWN = "start", "end", "unknown"
SAMPLE_CHATS = (
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "user", "assistant"),
    ("user", "assistant", "assistant"),
)  # rendered to find the markers of a template; those that it refuses are skipped
LINE_BREAK = "\n"
DEFAULT_SEPARATOR = "\n\n"  # between two turns without a marker


class ChatMarker(NamedTuple):
    """The text between a turn of `previous_role` and one of `next_role`, and the bytes of its tokens."""

    previous_role: str
    next_role: str
    text: str
    data: bytes


class Turn(NamedTuple):
    """The bytes `[start, stop)` of a window that `role` wrote; the ending after an answer begins at `ending_start`."""

    role: str
    start: int
    stop: int
    ending_start: int | None


class TranslatedChat(NamedTuple):
    """A window as the teacher's template writes it, and the S segments of bytes that both texts share.

    `student_spans`, `teacher_spans` and `shared_spans` `[S 2]` locate each segment in the window, in `text`, and in
    `shared_bytes`, which holds them end to end. An ending is one byte of `shared_bytes`.
    """

    text: str
    student_spans: Int64[Tensor, "S 2"]
    teacher_spans: Int64[Tensor, "S 2"]
    shared_spans: Int64[Tensor, "S 2"]
    shared_bytes: bytes


@dataclass(frozen=True, eq=False)
class ChatMarkers:
    """The markers of a template, the string that ends an answer, the special tokens in markers, and a BOS.

    Of two markers between the same roles, the first opens the last answer of a chat, and the last all other answers.
    """

    markers: Sequence[ChatMarker]
    ending: str
    special_tokens: Mapping[int, bytes]
    bos: str

    @classmethod
    def from_template(cls, tokenizer: PreTrainedTokenizerBase, pieces: TokenBytes) -> "ChatMarkers | None":
        """The markers of a tokenizer's template; None without one, or if it cannot be described by markers."""
        try:
            template = ChatTemplate(tokenizer)
        except DataError:
            return None
        marker_ids: dict[ChatMarker, frozenset[int]] = {}
        for roles in SAMPLE_CHATS:
            marker_ids |= dict(_find_markers(template, pieces, roles))
        special_tokens = {i: pieces.by_id[i] for i in frozenset().union(*marker_ids.values()) & pieces.special_ids}
        special_strings = [str(tokenizer.convert_ids_to_tokens(i)) for i in special_tokens]
        ending = next((token for token in special_strings if template.stop.endswith(token)), template.stop)
        chat_markers = cls(list(marker_ids), ending, special_tokens, _get_bos(tokenizer))
        return chat_markers if ending and chat_markers.get_text("user", "assistant") != DEFAULT_SEPARATOR else None

    @classmethod
    def has_unknown_template(cls, tokenizer: PreTrainedTokenizerBase, pieces: TokenBytes) -> bool:
        """Whether a tokenizer has a template that cannot be described by markers."""
        return bool(tokenizer.chat_template) and cls.from_template(tokenizer, pieces) is None

    @classmethod
    def from_plain_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatMarkers":
        """The markers of a tokenizer without a template: line breaks between turns, end of text after the last."""
        bos, ending = _get_bos(tokenizer), str(tokenizer.eos_token or "")
        roles = ("system", "user", "assistant")
        turn_markers = [
            ChatMarker(previous_role, role, LINE_BREAK, LINE_BREAK.encode())
            for previous_role in roles
            for role in roles
        ]
        opening_markers = [ChatMarker(START, role, bos, bos.encode()) for role in roles]
        return cls(
            [*opening_markers, *turn_markers, ChatMarker("assistant", END, ending, ending.encode())], ending, {}, bos
        )

    def split_turns(self, data: bytes) -> tuple[list[Turn], bool]:
        """The turns of a window, and whether the window begins where the chat does.

        Text that is in no marker belongs to the current turn. A window that begins within a turn belongs to the
        assistant up to the first marker. A window that ends within a marker ends with the answer before it.
        """
        opening_marker = next((marker for marker in self._markers_by_role[START] if data.startswith(marker.data)), None)
        role, start = (
            self._find_opening(data) if opening_marker is None else (opening_marker.next_role, len(opening_marker.data))
        )
        turns = []
        while (match := self._find_next(role, data, start)) is not None:
            position, marker = match
            turns.append(self._make_turn(data, marker.previous_role, start, position))
            role, start = marker.next_role, position + len(marker.data)
        turns.append(self._make_turn(data, role, start, self._find_end(data, role, start)))
        return turns, opening_marker is not None

    def get_text(self, previous_role: str, role: str, *, is_final: bool = True) -> str:
        """The text between two turns. A system message without a marker of its own gets the opening of the user."""
        texts = [
            marker.text for marker in self.markers if (marker.previous_role, marker.next_role) == (previous_role, role)
        ]
        if texts or previous_role != START:
            return texts[0 if is_final else -1] if texts else DEFAULT_SEPARATOR
        opening = self.get_text(START, "user")
        return opening if role == "system" else self.bos * opening.startswith(self.bos)

    def _find_opening(self, data: bytes) -> tuple[str, int]:
        """The role of the first turn in a window that begins within a chat, and its start; it may begin in a marker."""
        bos = self.bos.encode()
        position = len(bos) if bos in self.special_tokens.values() and data.startswith(bos) else 0
        for marker in self._markers_by_role[UNKNOWN]:
            cuts = (cut for token in self.special_tokens.values() if (cut := marker.data.find(token, 1)) > 0)
            if any(data.startswith(suffix := marker.data[cut:], position) for cut in cuts):
                return marker.next_role, position + len(suffix)
        return UNKNOWN, position

    def _find_end(self, data: bytes, role: str, start: int) -> int:
        """Where the last turn of a window ends: at the last ending that only the rest of a marker follows.

        A turn that is not an answer ends at the first special token, which begins a marker that was cut.
        """
        if role not in ("assistant", UNKNOWN):
            return min(
                (position for piece in self.special_tokens.values() if (position := data.find(piece, start)) >= 0),
                default=len(data),
            )
        ending = self.ending.encode()
        closing_parts = [
            marker.data.partition(ending) for marker in self.markers if marker.previous_role == "assistant"
        ]
        position = data.rfind(ending, start)
        while position >= 0 and not any(
            separator and suffix.startswith(data[position + len(ending) :]) for _, separator, suffix in closing_parts
        ):
            position = data.rfind(ending, start, position)
        if position < 0:
            return len(data)
        remainder = next(
            (
                piece
                for piece, separator, _ in closing_parts
                if separator and piece and data.endswith(piece, start, position)
            ),
            b"",
        )
        return position - len(remainder)

    def _make_turn(self, data: bytes, role: str, start: int, stop: int) -> Turn:
        ending_start = data.find(self.ending.encode(), stop) if role in ("assistant", UNKNOWN) else -1
        return Turn(role, start, stop, None if ending_start < 0 or data[stop:ending_start].strip() else ending_start)

    def _find_next(self, role: str, data: bytes, start: int) -> tuple[int, ChatMarker] | None:
        """The first marker from `start` on that may follow `role`; of several, the longest."""
        matches = [
            (position, marker)
            for marker in self._markers_by_role[role]
            if (position := data.find(marker.data, start)) >= 0
        ]
        return min(matches, key=lambda match: match[0], default=None)

    @cached_property
    def _markers_by_role(self) -> Mapping[str, list[ChatMarker]]:
        """The markers that may follow each role, the longest first; an unknown role has those of user and assistant."""
        markers = sorted(
            (marker for marker in self.markers if marker.data and marker.next_role != END),
            key=lambda marker: -len(marker.data),
        )
        markers_by_role = {
            role: [m for m in markers if m.previous_role == role] for role in (START, "system", "user", "assistant")
        }
        turn_markers = [
            m for m in markers if m.previous_role in ("user", "assistant")
        ]  # the marker after a system message may be a mere line break
        turn_markers.sort(
            key=lambda m: (-len(m.data), m.previous_role != ("user" if m.next_role == "assistant" else "assistant"))
        )
        return {**markers_by_role, UNKNOWN: turn_markers}


class _TranslatedPart(NamedTuple):
    """A piece of the translated text, the bytes of the window that it translates, and the bytes that both share."""

    text: str
    student_span: tuple[int, int] | None = None
    shared_bytes: bytes = b""


def translate_chat(data: bytes, student: ChatMarkers, teacher: ChatMarkers) -> TranslatedChat:
    """Translates a window of the student's text, in which the special tokens of markers are written out."""
    parts = list(_translate_parts(data, student, teacher))
    sizes = torch.tensor([[len(part.text.encode()), len(part.shared_bytes)] for part in parts])
    ends = sizes.cumsum(0)
    has_student_span = torch.tensor([bool(part.student_span) for part in parts])
    spans = torch.stack([ends - sizes, ends], -1)[has_student_span]  # [S, (theirs, common), (start, end)]
    student_spans = torch.tensor([part.student_span for part in parts if part.student_span], dtype=torch.int64).reshape(
        -1, 2
    )
    shared_bytes = b"".join(part.shared_bytes for part in parts)
    return TranslatedChat("".join(part.text for part in parts), student_spans, spans[:, 0], spans[:, 1], shared_bytes)


def _translate_parts(data: bytes, student: ChatMarkers, teacher: ChatMarkers) -> Iterator[_TranslatedPart]:
    turns, is_complete = student.split_turns(data)
    previous_role, ending_start, ending_size = START, None, len(student.ending.encode())
    for number, turn in enumerate(turns):
        is_final = number == len(turns) - 1
        role = turn.role if is_complete or number else UNKNOWN
        yield from _make_marker_parts(
            teacher.get_text(previous_role, role, is_final=is_final), teacher.ending, ending_start, ending_size
        )
        for start, stop in _find_text_spans(data, turn, student):
            yield _TranslatedPart(to_readable_text(data[start:stop]), (start, stop), data[start:stop])
        previous_role, ending_start = turn.role, turn.ending_start
    if ending_start is not None:
        yield from _make_marker_parts(teacher.get_text("assistant", END), teacher.ending, ending_start, ending_size)


def _find_text_spans(data: bytes, turn: Turn, markers: ChatMarkers) -> Iterator[tuple[int, int]]:
    """The parts of a turn between special tokens outside of markers, which another tokenizer cannot read as text."""
    start = turn.start
    while start < turn.stop:
        matches = (
            (data.find(candidate, start, turn.stop), len(candidate)) for candidate in markers.special_tokens.values()
        )
        position, size = min((candidate for candidate in matches if candidate[0] >= 0), default=(turn.stop, 0))
        if position > start:
            yield start, position
        start = position + size


def _make_marker_parts(text: str, ending: str, ending_start: int | None, ending_size: int) -> Iterator[_TranslatedPart]:
    """The teacher's marker as parts; its ending translates the student's, of `ending_size` bytes at `ending_start`."""
    if ending_start is None or not ending or ending not in text:
        yield _TranslatedPart(text)
    else:
        text_before, _, text_after = text.partition(ending)
        yield from (
            _TranslatedPart(text_before),
            _TranslatedPart(ending, (ending_start, ending_start + ending_size), b"."),
            _TranslatedPart(text_after),
        )


def _find_markers(
    template: ChatTemplate, pieces: TokenBytes, roles: Sequence[str]
) -> Iterator[tuple[ChatMarker, frozenset[int]]]:
    """The markers of one chat, with their ids; none if the template refuses it or leaves out its contents."""
    contents = [f"potstill{number}." for number in range(len(roles))]
    try:
        text = template.render(
            [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        )
    except DataError:
        return
    ids = template.tokenizer(text, add_special_tokens=False).input_ids
    data, spans = decode_with_spans(ids, pieces, visible_ids=pieces.special_ids)
    text_gaps, data_gaps = _find_gaps(text, contents), _find_gaps(data, [content.encode() for content in contents])
    if text_gaps is None or data_gaps is None:
        return
    gaps = zip(pairwise((START, *roles, END)), text_gaps, data_gaps, strict=True)
    for (previous_role, role), (start, stop), (data_start, data_end) in gaps:
        inside_mask = ((spans[:, 0] >= data_start) & (spans[:, 1] <= data_end)).tolist()
        marker = ChatMarker(previous_role, role, text[start:stop], data[data_start:data_end])
        yield marker, frozenset(i for i, is_inside in zip(ids, inside_mask, strict=True) if is_inside)


def _find_gaps(text: AnyStr, contents: Sequence[AnyStr]) -> list[tuple[int, int]] | None:
    """The spans before, between and after the `contents`; None if they are not in the text in this order."""
    gaps: list[tuple[int, int]] = []
    start = 0
    for content in contents:
        position = text.find(content, start)
        if position < 0:
            return None
        gaps.append((start, position))
        start = position + len(content)
    return [*gaps, (start, len(text))]


def _get_bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer puts before a text; empty if there is none."""
    return str(tokenizer.bos_token) if tokenizer.bos_token_id in tokenizer("").input_ids else ""
