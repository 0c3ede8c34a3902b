"""What two tokenizers read one text as, told by the bytes that their tokens stand for, whatever the alignment says."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from potstill.core.types import IGNORE, Batch, supervised_positions
from potstill.data.cross_tokenizer.packs import TokenizerInfo
from potstill.data.cross_tokenizer.token_spans import to_readable_text

MAX_SHOWN_CHARACTERS = 40  # characters
UNTRAINED_MARK = "\0"  # stands for a token that is not trained on
END_BYTES = b"\x00<end>"  # what every special token stands for: it ends a text or a turn


def supervised_text(batch: Batch, reader: TokenizerInfo) -> list[str]:
    """Of each document what is trained on, as text; special tokens are none, and bytes of no character are '?'."""
    ids, labels, documents = (batch[name][0] for name in ("input_ids", "labels", "documents"))
    sizes = torch.bincount(documents).tolist()
    pairs = zip(ids.split(sizes), labels.split(sizes), strict=True)
    return [
        _decode_trained(window.tolist(), (window_labels != IGNORE).tolist(), reader) for window, window_labels in pairs
    ]


def _decode_trained(ids: Sequence[int], trained_mask: Sequence[bool], reader: TokenizerInfo) -> str:
    pieces = (
        reader.pieces.by_id[i] if is_trained else UNTRAINED_MARK.encode()
        for i, is_trained in zip(ids, trained_mask, strict=True)
    )
    parts = (b"" if is_special(i, reader) else piece for i, piece in zip(ids, pieces, strict=True))
    return to_readable_text(b"".join(parts))


def is_special(i: int, reader: TokenizerInfo) -> bool:
    """Whether this id stands for no text: control tokens, and what ends an answer where that is one token."""
    ending = (
        None
        if reader.chat_markers is None
        else reader.tokenizer.backend_tokenizer.token_to_id(reader.chat_markers.ending)
    )
    return i == ending or (i in reader.pieces.special_ids and i not in reader.pieces.byte_fallback_ids)


def is_contained(student_text: str, teacher_text: str) -> bool:
    """Whether the teacher reads a part of each stretch, and nearly all: at the ends it may lack a part of a token."""
    stretches = [
        [stretch for stretch in text.split(UNTRAINED_MARK) if stretch.strip()] for text in (student_text, teacher_text)
    ]
    if len(stretches[0]) != len(stretches[1]) or len(teacher_text) < len(student_text) - MAX_SHOWN_CHARACTERS:
        return False
    return all(
        teacher_stretch.strip() in student_stretch for student_stretch, teacher_stretch in zip(*stretches, strict=True)
    )


def target_bytes(batch: Batch, reader: TokenizerInfo) -> list[bytes]:
    """What each row has to predict, in bytes; END for a special token."""
    targets = supervised_positions(batch)[1].tolist()
    return [END_BYTES if is_special(i, reader) else reader.pieces.by_id[i] for i in targets]


def join_groups(rows: Sequence[bytes], groups: Sequence[int]) -> dict[int, bytes]:
    """The bytes of each group of rows."""
    group_bytes: dict[int, bytes] = defaultdict(bytes)
    for row, group in zip(rows, groups, strict=True):
        if group >= 0:
            group_bytes[group] += row
    return group_bytes


def is_same_bytes(student_bytes: bytes, teacher_bytes: bytes) -> bool:
    """Whether these are the same bytes; the space that some teachers put in front of a text is in no text."""
    return teacher_bytes in (student_bytes, b" " + student_bytes)


def strip_untrained(text: str) -> str:
    """What was `said`, without what is not trained on."""
    return text.replace(UNTRAINED_MARK, "")


def abbreviate(text: str) -> str:
    """The beginning of what was `said`, for people."""
    text = strip_untrained(text)
    return repr(text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "...")
