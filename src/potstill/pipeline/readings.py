"""What two tokenizers read one text as, told by the bytes that their tokens stand for, whatever the alignment says."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from potstill.core.types import IGNORE, Batch, supervised
from potstill.data.pairs import Reader
from potstill.data.spans import readable

BRIEF = 40  # characters
UNTRAINED = "\0"  # stands for a token that is not trained on
END = b"\x00<end>"  # what every special token stands for: it ends a text or a turn


def said(batch: Batch, reader: Reader) -> list[str]:
    """Of each document what is trained on, as text; special tokens are none, and bytes of no character are '?'."""
    ids, labels, documents = (batch[name][0] for name in ("input_ids", "labels", "documents"))
    sizes = torch.bincount(documents).tolist()
    pairs = zip(ids.split(sizes), labels.split(sizes), strict=True)
    return [_text(one.tolist(), (keep != IGNORE).tolist(), reader) for one, keep in pairs]


def _text(ids: Sequence[int], trained: Sequence[bool], reader: Reader) -> str:
    words = (reader.pieces.of[i] if keep else UNTRAINED.encode() for i, keep in zip(ids, trained, strict=True))
    parts = (b"" if special(i, reader) else word for i, word in zip(ids, words, strict=True))
    return readable(b"".join(parts))


def special(i: int, reader: Reader) -> bool:
    """Whether this id stands for no text: control tokens, and what ends an answer where that is one token."""
    ending = None if reader.marks is None else reader.tokenizer.backend_tokenizer.token_to_id(reader.marks.ending)
    return i == ending or (i in reader.pieces.special and i not in reader.pieces.raw)


def part_of(ours: str, theirs: str) -> bool:
    """Whether the teacher reads a part of each stretch, and nearly all: at the ends it may lack a part of a token."""
    stretches = [[one for one in text.split(UNTRAINED) if one.strip()] for text in (ours, theirs)]
    if len(stretches[0]) != len(stretches[1]) or len(theirs) < len(ours) - BRIEF:
        return False
    return all(other.strip() in own for own, other in zip(*stretches, strict=True))


def predicted(batch: Batch, reader: Reader) -> list[bytes]:
    """What each row has to predict, in bytes; END for a special token."""
    targets = supervised(batch)[1].tolist()
    return [END if special(i, reader) else reader.pieces.of[i] for i in targets]


def runs(rows: Sequence[bytes], groups: Sequence[int]) -> dict[int, bytes]:
    """The bytes of each group of rows."""
    found: dict[int, bytes] = defaultdict(bytes)
    for row, group in zip(rows, groups, strict=True):
        if group >= 0:
            found[group] += row
    return found


def equal(ours: bytes, theirs: bytes) -> bool:
    """Whether these are the same bytes; the space that some teachers put in front of a text is in no text."""
    return theirs in (ours, b" " + ours)


def bare(text: str) -> str:
    """What was `said`, without what is not trained on."""
    return text.replace(UNTRAINED, "")


def brief(text: str) -> str:
    """The beginning of what was `said`, for people."""
    text = bare(text)
    return repr(text if len(text) <= BRIEF else text[:BRIEF] + "...")
