"""Adds to a pack the same documents in the teacher's tokenizer, and aligns the tokens of both.

    student          the | quick | br | own | <end>
    teacher   <bos>  the | quick | brown    | </s>      equal: the, quick, and the two ends

The text of a window is decoded from its ids (`decode_with_spans`), so sampled completions are translated
like a corpus. The teacher reads that text after its own BOS, without the student's special tokens. It reads a chat as
its own template writes one (`translate_chat`); the tokens that end an answer are equal. A teacher token is trained on
if all its bytes are. A trained special token at the end of a text becomes the teacher's end-of-text token.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.types import ALIGNED_GROUPS, ALIGNED_PAIRS, EDIT_ALIGNED_PAIRS, IGNORE, supervised_positions
from potstill.data.cross_tokenizer.chat_translation import ChatMarkers, TranslatedChat, translate_chat
from potstill.data.cross_tokenizer.token_spans import LocatedTokens, decode_with_spans, locate_tokens, to_readable_text
from potstill.data.packing import Pack, collate
from potstill.models.tokenizers.token_bytes import TokenBytes, read_token_bytes
from potstill.ops import align, edit_distance


class TokenizerInfo(NamedTuple):
    """A tokenizer, the bytes of its tokens, and the markers between the turns of a chat if it is to read chats."""

    tokenizer: PreTrainedTokenizerBase
    pieces: TokenBytes
    chat_markers: ChatMarkers | None = None
    adds_dummy_prefix: bool = False  # whether it adds a space before a text, as SentencePiece does

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenizerInfo":
        """The information for reading plain text."""
        token_pieces = read_token_bytes(tokenizer)
        text = decode_with_spans(tokenizer("a", add_special_tokens=False).input_ids, token_pieces)[0]
        return cls(tokenizer, token_pieces, adds_dummy_prefix=text == b" a")


@lru_cache(maxsize=4)  # a run calls it several times, and a vocabulary of 262k ids takes a while
def inspect_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, chats: bool
) -> tuple[TokenizerInfo, TokenizerInfo]:
    """Student and teacher for reading text or `chats`. A teacher without a chat template reads line by line."""
    student_info, teacher_info = TokenizerInfo.from_tokenizer(student), TokenizerInfo.from_tokenizer(teacher)
    student_markers = ChatMarkers.from_template(student, student_info.pieces) if chats else None
    if student_markers is None:
        return student_info, teacher_info
    teacher_markers = ChatMarkers.from_template(teacher, teacher_info.pieces) or ChatMarkers.from_plain_tokenizer(
        teacher
    )
    return student_info._replace(chat_markers=student_markers), teacher_info._replace(chat_markers=teacher_markers)


class TranslatedWindow(NamedTuple):
    """A document in the teacher's tokens, and their alignment with the student's.

    `equal_tokens [P 2]` holds the positions of equal tokens, the student's first. `groups` numbers the runs of trained
    tokens that cover the same bytes together, for each token of either side; -1 for none. `edit_alignment [W 2]` pairs
    the positions of rows by minimum edit distance, if that is needed.
    """

    input_ids: Int64[Tensor, " M"]
    labels: Int64[Tensor, " M"]
    equal_tokens: Int64[Tensor, "P 2"]
    groups: align.Groups
    edit_alignment: Int64[Tensor, "W 2"]


class CrossTokenizerPacks:
    """A data set of packs, each with the inputs of a teacher that has another tokenizer.

    Each pack keeps its keys and declared fields, and gets `teacher.input_ids [M]`, `teacher.labels [M]` and
    `teacher.lengths [documents]`. The alignment counts tokens within the pack: `aligned.tokens [P 2]`,
    `aligned.groups [T]`, `aligned.teacher_groups [M]`, and `aligned.warped [W 2]` with `needs_edit_alignment`.
    `data.packing.collate` makes a batch of such packs.
    """

    def __init__(
        self,
        packs: Any,
        student: TokenizerInfo,
        teacher: TokenizerInfo,
        *,
        needs_edit_alignment: bool = False,
        max_length: int | None = None,
    ) -> None:
        self.packs, self.student, self.teacher, self.needs_edit_alignment = (
            packs,
            student,
            teacher,
            needs_edit_alignment,
        )
        self.max_length = max_length  # of the teacher's tokens in a window; it reads the first ones of a longer one

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, i: int) -> Pack:
        return self.add_teacher_inputs(self.packs[i])

    def add_teacher_inputs(self, pack: Pack) -> Pack:
        """One pack with the teacher's inputs added."""
        sizes = pack["lengths"].tolist()
        windows = list(zip(pack["input_ids"].split(sizes), pack["labels"].split(sizes), strict=True))
        translations = translate_windows(
            windows,
            self.student,
            self.teacher,
            needs_edit_alignment=self.needs_edit_alignment,
            max_length=self.max_length,
        )
        lengths = torch.tensor([len(translation.input_ids) for translation in translations])
        starts = torch.stack([pack["lengths"].cumsum(0) - pack["lengths"], lengths.cumsum(0) - lengths], 1)
        totals = torch.tensor([translation.groups.total for translation in translations])
        group_offsets = totals.cumsum(0) - totals
        return {
            **pack,
            "teacher.input_ids": torch.cat([translation.input_ids for translation in translations]),
            "teacher.labels": torch.cat([translation.labels for translation in translations]),
            "teacher.lengths": lengths,
            "aligned.tokens": torch.cat(
                [translation.equal_tokens + start for translation, start in zip(translations, starts, strict=True)]
            ),
            ALIGNED_GROUPS[0]: _offset_groups(
                [translation.groups.first for translation in translations], group_offsets
            ),
            ALIGNED_GROUPS[1]: _offset_groups(
                [translation.groups.second for translation in translations], group_offsets
            ),
            **(
                {
                    EDIT_ALIGNED_PAIRS: torch.cat(
                        [
                            translation.edit_alignment + offset
                            for translation, offset in zip(translations, starts, strict=True)
                        ]
                    )
                }
                if self.needs_edit_alignment
                else {}
            ),
        }


class TeacherText(NamedTuple):
    """A window as text for the teacher, the bytes that both texts share, and the span of each student token in them.

    `translation` locates these bytes in `text`; None if they are all of it.
    """

    text: str
    data: bytes
    spans: Int64[Tensor, "T 2"]
    translation: TranslatedChat | None


def translate_windows(
    windows: Sequence[tuple[Tensor, Tensor]],
    student: TokenizerInfo,
    teacher: TokenizerInfo,
    *,
    needs_edit_alignment: bool = False,
    max_length: int | None = None,
) -> list[TranslatedWindow]:
    """Translates windows of the student's ids and labels: by the teacher's template if both have chat markers.

    The teacher reads the first `max_length` of its tokens. The student's tokens after them are aligned with nothing.
    """
    teacher_texts = [decode_window(ids.tolist(), student, teacher) for ids, _ in windows]
    is_plain = student.chat_markers is None or teacher.chat_markers is None
    tokenizations = locate_tokens(
        [teacher_text.text for teacher_text in teacher_texts],
        teacher.tokenizer,
        teacher.pieces,
        add_special_tokens=is_plain,
    )
    return [
        _translate_window(
            teacher_text,
            ids,
            labels,
            tokenization,
            student.pieces,
            teacher,
            needs_edit_alignment=needs_edit_alignment,
            max_length=max_length,
        )
        for (ids, labels), teacher_text, tokenization in zip(windows, teacher_texts, tokenizations, strict=True)
    ]


def decode_window(ids: Sequence[int], student: TokenizerInfo, teacher: TokenizerInfo) -> TeacherText:
    if student.chat_markers is None or teacher.chat_markers is None:
        data, spans = decode_with_spans(ids, student.pieces)
        if data[:1] == b" " and student.adds_dummy_prefix:  # added by the student's tokenizer, not in the text
            data, spans = data[1:], (spans - 1).clamp(min=0)
        return TeacherText(to_readable_text(data), data, spans, None)
    data, spans = decode_with_spans(ids, student.pieces, visible_ids=student.chat_markers.special_tokens)
    translation = translate_chat(data, student.chat_markers, teacher.chat_markers)
    return TeacherText(
        translation.text,
        translation.shared_bytes,
        align.map_to_shared_text(spans, translation.student_spans, translation.shared_spans),
        translation,
    )


def _translate_window(
    teacher_text: TeacherText,
    ids: Tensor,
    labels: Tensor,
    tokenization: LocatedTokens,
    pieces: TokenBytes,
    teacher: TokenizerInfo,
    *,
    needs_edit_alignment: bool,
    max_length: int | None,
) -> TranslatedWindow:
    data, spans = teacher_text.data, teacher_text.spans
    teacher_ids, teacher_spans = _strip_eos(tokenization, teacher)
    if teacher_text.translation is not None:
        teacher_spans = align.map_to_shared_text(
            teacher_spans, teacher_text.translation.teacher_spans, teacher_text.translation.shared_spans
        )
    trained_bytes = torch.zeros(len(data) + 1, dtype=torch.bool)
    for start, end in spans[labels != IGNORE].tolist():
        trained_bytes[start:end] = True
    if _ends_with_eos(ids, labels, spans, pieces) and teacher.tokenizer.eos_token_id is not None:
        end_of_text = torch.tensor([[len(data), len(data) + 1]])  # one byte that both sides share, after all others
        spans = torch.cat([spans[:-1], end_of_text])
        teacher_ids = torch.cat([teacher_ids, torch.tensor([teacher.tokenizer.eos_token_id])])
        teacher_spans = torch.cat([teacher_spans, end_of_text])
        trained_bytes[-1] = True
    teacher_ids, teacher_spans = teacher_ids[:max_length], teacher_spans[:max_length]
    teacher_labels = torch.where(_find_inside_spans(teacher_spans, trained_bytes), teacher_ids, IGNORE)
    teacher_labels[:1] = IGNORE
    is_readable = torch.from_numpy(_find_readable_bytes(data))
    spans, teacher_spans = (
        _mask_spans(side_spans, _find_inside_spans(side_spans, is_readable)) for side_spans in (spans, teacher_spans)
    )
    student_mask, teacher_mask = labels != IGNORE, teacher_labels != IGNORE
    student_mask[:1] = False
    groups = align.merge_spans(_mask_spans(spans, student_mask), _mask_spans(teacher_spans, teacher_mask))
    edit_alignment = torch.empty(0, 2, dtype=torch.long)
    if needs_edit_alignment:
        edit_alignment = _align_by_edit_distance(
            (ids, student_mask, pieces), (teacher_ids, teacher_mask, teacher.pieces)
        )
    return TranslatedWindow(
        teacher_ids, teacher_labels, align.match_spans(spans, teacher_spans), groups, edit_alignment
    )


def _strip_eos(tokenization: LocatedTokens, teacher: TokenizerInfo) -> LocatedTokens:
    """The tokens without the end-of-text token that some tokenizers append to every text."""
    ids, spans = tokenization
    has_eos = len(ids) and int(ids[-1]) == teacher.tokenizer.eos_token_id and int(spans[-1, 0]) == int(spans[-1, 1])
    return LocatedTokens(ids[:-1], spans[:-1]) if has_eos else tokenization


def _ends_with_eos(ids: Tensor, labels: Tensor, spans: Tensor, pieces: TokenBytes) -> bool:
    """Whether a window ends with a trained special token that covers no byte: an end-of-text token."""
    return bool(int(ids[-1]) in pieces.special_ids and labels[-1] != IGNORE and spans[-1, 0] == spans[-1, 1])


def _align_by_edit_distance(
    student: tuple[Tensor, Tensor, TokenBytes], teacher: tuple[Tensor, Tensor, TokenBytes]
) -> Int64[Tensor, "W 2"]:
    """Pairs of row positions, one before each trained token, that the edit alignment matches one to one."""
    row_positions = [mask.nonzero()[:, 0] - 1 for _, mask, _ in (student, teacher)]
    (student_positions, student_ids, student_pieces), (teacher_positions, teacher_ids, teacher_pieces) = (
        (position, side[0], side[2]) for position, side in zip(row_positions, (student, teacher), strict=True)
    )
    student_strings = [student_pieces.by_id[i].strip() for i in student_ids[student_positions].tolist()]
    teacher_strings = [teacher_pieces.by_id[i].strip() for i in teacher_ids[teacher_positions].tolist()]
    if not student_strings or not teacher_strings:
        return torch.empty(0, 2, dtype=torch.long)
    matches = edit_distance.find_single_matches(
        edit_distance.dtw_path(edit_distance.edit_distance_table(teacher_strings, student_strings)),
        len(student_strings),
    )
    matched = (matches >= 0).nonzero()[:, 0]
    return torch.stack([student_positions[matched], teacher_positions[matches[matched]]], 1)


def _mask_spans(spans: Int64[Tensor, "T 2"], mask: Bool[Tensor, " T"]) -> Int64[Tensor, "T 2"]:
    """`spans`, made empty where `mask` is false."""
    return torch.where(mask[:, None], spans, spans[:, :1])


def _offset_groups(groups: Sequence[Int64[Tensor, " _"]], offsets: Int64[Tensor, " D"]) -> Int64[Tensor, " T"]:
    """The groups of all documents, numbered on from document to document."""
    return torch.cat(
        [torch.where(numbers >= 0, numbers + offset, -1) for numbers, offset in zip(groups, offsets, strict=True)]
    )


def _find_inside_spans(spans: Int64[Tensor, "T 2"], mask: Bool[Tensor, " bytes"]) -> Bool[Tensor, " T"]:
    """Whether each span is not empty and covers only bytes where `mask` is true."""
    counts = torch.cat([torch.zeros(1, dtype=torch.long), mask.long().cumsum(0)])
    sizes = spans[:, 1] - spans[:, 0]
    return (sizes > 0) & (counts[spans[:, 1]] - counts[spans[:, 0]] == sizes)


def _find_readable_bytes(data: bytes) -> Bool[np.ndarray, " bytes_and_one"]:
    """Whether each byte is part of a valid character; true for the position after the last byte."""
    is_readable = np.ones(len(data) + 1, dtype=bool)
    position = 0
    while position < len(data):
        try:
            data[position:].decode()
            break
        except UnicodeDecodeError as error:
            is_readable[position + error.start : position + error.end] = False
            position += error.end
    return is_readable


def compute_aligned_share(packs: "CrossTokenizerPacks", *, max_packs: int = 16) -> float:
    """The share of trained rows whose next token the teacher has too, in the first `max_packs` packs."""
    batches = [collate([packs[i]]) for i in range(min(max_packs, len(packs)))]
    rows = sum(len(supervised_positions(batch)[1]) for batch in batches)
    return sum(batch[ALIGNED_PAIRS].shape[1] for batch in batches) / max(1, rows)
