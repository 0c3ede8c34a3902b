"""The documents of a pack as a teacher with another tokenizer reads them, and which tokens of the two are the same.

    student          the | quick | br | own | <end>
    teacher   <bos>  the | quick | brown    | </s>      the same: the, quick, and the two ends

The ids of a window determine its text (`decode_with_spans`), also where the student sampled them. The teacher reads
that text after its own BOS, without the student's special tokens. It reads a chat as its own template writes it
(`translate_chat`), with its own stop tokens. Its tokens are trained where all of their bytes are. A trained special
token at the end of a text becomes the teacher's end of text.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UsageError
from potstill.core.types import ALIGNED_GROUPS, ALIGNED_PAIRS, EDIT_ALIGNED_PAIRS, IGNORE, supervised_positions
from potstill.data.cross_tokenizer.chat_translation import ChatMarkers, TranslatedChat, translate_chat
from potstill.data.cross_tokenizer.token_spans import LocatedTokens, decode_with_spans, locate_tokens, to_readable_text
from potstill.data.packing import Pack, collate
from potstill.models.tokenizers.token_bytes import TokenBytes, read_token_bytes
from potstill.ops import align, edit_distance


class TokenizerInfo(NamedTuple):
    """A tokenizer, what its ids stand for, and the marks between the turns of a chat where chats are to be read."""

    tokenizer: PreTrainedTokenizerBase
    pieces: TokenBytes
    chat_markers: ChatMarkers | None = None
    adds_dummy_prefix: bool = False  # whether the tokenizer puts a space before a text, as SentencePiece does

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenizerInfo":
        """One of text."""
        token_pieces = read_token_bytes(tokenizer)
        text = decode_with_spans(tokenizer("a", add_special_tokens=False).input_ids, token_pieces)[0]
        return cls(tokenizer, token_pieces, adds_dummy_prefix=text == b" a")


@lru_cache(maxsize=4)  # a run asks several times, and a vocabulary of 262k ids takes a while to read
def inspect_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, chats: bool
) -> tuple[TokenizerInfo, TokenizerInfo]:
    """Student and teacher, as they read text or `chats`. A teacher without a template for them reads line by line."""
    student_info, teacher_info = TokenizerInfo.from_tokenizer(student), TokenizerInfo.from_tokenizer(teacher)
    student_markers = ChatMarkers.from_template(student, student_info.pieces) if chats else None
    if student_markers is None:
        return student_info, teacher_info
    teacher_markers = ChatMarkers.from_template(teacher, teacher_info.pieces) or ChatMarkers.from_plain_tokenizer(
        teacher
    )
    return student_info._replace(chat_markers=student_markers), teacher_info._replace(chat_markers=teacher_markers)


class TranslatedWindow(NamedTuple):
    """A document as the teacher reads it, and how its tokens lie beside the student's.

    `same [P 2]` are the numbers of equal tokens, the student's first. `groups` numbers the runs of trained tokens that
    stand for the same bytes together, for each token of either side, -1 for none. `warped [W 2]` pairs the tokens that
    rows are read at by minimum edit distance, where that was asked for.
    """

    input_ids: Int64[Tensor, " M"]
    labels: Int64[Tensor, " M"]
    equal_tokens: Int64[Tensor, "P 2"]
    groups: align.Groups
    edit_alignment: Int64[Tensor, "W 2"]


class CrossTokenizerPacks:
    """A data set of packs, each with what a teacher of another tokenizer reads beside it.

    To the keys of a pack come `teacher.input_ids [M]`, `teacher.labels [M]`, `teacher.lengths [documents]`, and with
    numbers of tokens within the pack `aligned.tokens [P 2]`, `aligned.groups [T]`, `aligned.teacher_groups [M]` and, if
    `warped`, `aligned.warped [W 2]`; `data.packing.collate` makes a batch of them.
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
        self.max_length = max_length  # tokens that the teacher can read at once

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, i: int) -> Pack:
        return self.add_teacher_inputs(self.packs[i])

    def add_teacher_inputs(self, pack: Pack) -> Pack:
        """One pack with the teacher's reading of its documents."""
        sizes = pack["lengths"].tolist()
        windows = list(zip(pack["input_ids"].split(sizes), pack["labels"].split(sizes), strict=True))
        translations = translate_windows(
            windows, self.student, self.teacher, needs_edit_alignment=self.needs_edit_alignment
        )
        lengths = torch.tensor([len(translation.input_ids) for translation in translations])
        if self.max_length is not None and (longest := int(lengths.max())) > self.max_length:
            raise UsageError(
                f"{int(pack['lengths'].max())} tokens of the student are {longest} of the teacher's, which reads "
                f"{self.max_length} at most; give a smaller --context"
            )
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


class _TeacherText(NamedTuple):
    """A window as text for the teacher; the bytes that both texts have, and where each student token lies in them.

    `told` says which bytes of `text` these are; None where they are all of it.
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
) -> list[TranslatedWindow]:
    """Each window of the student's ids and labels as the teacher reads it: through its template if both have marks."""
    teacher_texts = [_decode_window(ids.tolist(), student, teacher) for ids, _ in windows]
    is_plain = student.chat_markers is None or teacher.chat_markers is None
    tokenizations = locate_tokens(
        [teacher_text.text for teacher_text in teacher_texts],
        teacher.tokenizer,
        teacher.pieces,
        add_special_tokens=is_plain,
    )
    return [
        _translate_window(
            teacher_text, ids, labels, tokenization, student.pieces, teacher, needs_edit_alignment=needs_edit_alignment
        )
        for (ids, labels), teacher_text, tokenization in zip(windows, teacher_texts, tokenizations, strict=True)
    ]


def _decode_window(ids: Sequence[int], student: TokenizerInfo, teacher: TokenizerInfo) -> _TeacherText:
    if student.chat_markers is None or teacher.chat_markers is None:
        data, spans = decode_with_spans(ids, student.pieces)
        if data[:1] == b" " and student.adds_dummy_prefix:  # put in front by the student's tokenizer; in no text
            data, spans = data[1:], (spans - 1).clamp(min=0)
        return _TeacherText(to_readable_text(data), data, spans, None)
    data, spans = decode_with_spans(ids, student.pieces, visible_ids=student.chat_markers.special_tokens)
    translation = translate_chat(data, student.chat_markers, teacher.chat_markers)
    return _TeacherText(
        translation.text,
        translation.shared_bytes,
        align.map_to_shared_text(spans, translation.student_spans, translation.shared_spans),
        translation,
    )


def _translate_window(
    teacher_text: _TeacherText,
    ids: Tensor,
    labels: Tensor,
    tokenization: LocatedTokens,
    pieces: TokenBytes,
    teacher: TokenizerInfo,
    *,
    needs_edit_alignment: bool,
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
        end_of_text = torch.tensor([[len(data), len(data) + 1]])  # one byte that both sides have, behind all others
        spans = torch.cat([spans[:-1], end_of_text])
        teacher_ids = torch.cat([teacher_ids, torch.tensor([teacher.tokenizer.eos_token_id])])
        teacher_spans = torch.cat([teacher_spans, end_of_text])
        trained_bytes[-1] = True
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
    """Without the end of text that some tokenizers put behind every text, whether it ends there or not."""
    ids, spans = tokenization
    has_eos = len(ids) and int(ids[-1]) == teacher.tokenizer.eos_token_id and int(spans[-1, 0]) == int(spans[-1, 1])
    return LocatedTokens(ids[:-1], spans[:-1]) if has_eos else tokenization


def _ends_with_eos(ids: Tensor, labels: Tensor, spans: Tensor, pieces: TokenBytes) -> bool:
    """Whether a window ends with a special token that is trained and stands for no byte yet: an end of text."""
    return bool(int(ids[-1]) in pieces.special_ids and labels[-1] != IGNORE and spans[-1, 0] == spans[-1, 1])


def _align_by_edit_distance(
    student: tuple[Tensor, Tensor, TokenBytes], teacher: tuple[Tensor, Tensor, TokenBytes]
) -> Int64[Tensor, "W 2"]:
    """The pairs of tokens that rows are read at, one before each trained token, that warping puts with one another."""
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
    """`spans`, those that are not kept empty."""
    return torch.where(mask[:, None], spans, spans[:, :1])


def _offset_groups(groups: Sequence[Int64[Tensor, " _"]], offsets: Int64[Tensor, " D"]) -> Int64[Tensor, " T"]:
    """The groups of documents, counted on from document to document."""
    return torch.cat(
        [torch.where(numbers >= 0, numbers + offset, -1) for numbers, offset in zip(groups, offsets, strict=True)]
    )


def _find_inside_spans(spans: Int64[Tensor, "T 2"], mask: Bool[Tensor, " bytes"]) -> Bool[Tensor, " T"]:
    """Which spans are not empty and have only bytes that are held."""
    counts = torch.cat([torch.zeros(1, dtype=torch.long), mask.long().cumsum(0)])
    sizes = spans[:, 1] - spans[:, 0]
    return (sizes > 0) & (counts[spans[:, 1]] - counts[spans[:, 0]] == sizes)


def _find_readable_bytes(data: bytes) -> Bool[np.ndarray, " bytes_and_one"]:
    """Which bytes are part of a character, and the place behind them."""
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
    """The share of the rows trained on whose next token the teacher has too, in the first packs."""
    batches = [collate([packs[i]]) for i in range(min(max_packs, len(packs)))]
    rows = sum(len(supervised_positions(batch)[1]) for batch in batches)
    return sum(batch[ALIGNED_PAIRS].shape[1] for batch in batches) / max(1, rows)
