"""A text in two tokenizers as bytes, read from the tokens and not from the alignment that the checks test."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from potstill.core.types import IGNORE, Batch, supervised_positions
from potstill.data.cross_tokenizer.packs import TokenizerInfo
from potstill.data.cross_tokenizer.token_spans import to_readable_text

MAX_SHOWN_CHARACTERS = 40  # of a text, in a message
UNTRAINED_MARK = "\0"  # in place of a token that is not trained on
END_BYTES = b"\x00<end>"  # the bytes of every special token: it ends a text or a turn


def supervised_text(batch: Batch, reader: TokenizerInfo) -> list[str]:
    """The trained text of each document, without special tokens; bytes that form no character are '?'."""
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
    """Whether this id is no text: a control token, or the one token that ends an answer."""
    ending = (
        None
        if reader.chat_markers is None
        else reader.tokenizer.backend_tokenizer.token_to_id(reader.chat_markers.ending)
    )
    return i == ending or (i in reader.pieces.special_ids and i not in reader.pieces.byte_fallback_ids)


def is_contained(student_text: str, teacher_text: str) -> bool:
    """Whether the teacher's text holds each trained stretch, except for parts of tokens at its ends."""
    stretches = [
        [stretch for stretch in text.split(UNTRAINED_MARK) if stretch.strip()] for text in (student_text, teacher_text)
    ]
    if len(stretches[0]) != len(stretches[1]) or len(teacher_text) < len(student_text) - MAX_SHOWN_CHARACTERS:
        return False
    return all(
        teacher_stretch.strip() in student_stretch for student_stretch, teacher_stretch in zip(*stretches, strict=True)
    )


def target_bytes(batch: Batch, reader: TokenizerInfo) -> list[bytes]:
    """The bytes of each row's target; `END_BYTES` for a special token."""
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
    """Whether these are the same bytes, apart from the space that some tokenizers put before a text."""
    return teacher_bytes in (student_bytes, b" " + student_bytes)


def strip_untrained(text: str) -> str:
    """`text` without the marks of untrained tokens."""
    return text.replace(UNTRAINED_MARK, "")


def abbreviate(text: str) -> str:
    """The beginning of `text`, quoted, for a message."""
    text = strip_untrained(text)
    return repr(text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "...")
