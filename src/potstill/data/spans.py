"""Where each token lies in its text, in bytes.

What a token stands for (`models.pieces`) says it exactly wherever the tokens, put together, are the text: a byte-level
tokenizer's offsets are those of whole characters and say it only roughly. A space that SentencePiece puts before a text
or behind a special token is in no text and has no bytes. Where a tokenizer rewrote the text (NFC, lower case), tokens
are looked for near the tokenizer's offsets, and those that read otherwise there (an accent composed, an unknown
character) have an empty span: nothing is ever paired by a guess.
"""

import codecs
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.models.pieces import Pieces

UNREADABLE = "potstill.unreadable"  # how bytes that are no text are decoded


class Located(NamedTuple):
    """Tokens, and the bytes `[start, end)` of the text's UTF-8 that each stands for; empty spans for no text."""

    ids: Int64[Tensor, " T"]
    spans: Int64[Tensor, "T 2"]


def located(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, pieces: Pieces, *, specials: bool = True
) -> list[Located]:
    """`texts` as tokens with their spans; with `specials`, between the tokens that the tokenizer puts around a text.

    Spans ascend and do not overlap. A special token that is written out in a text stands for what is written.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=specials, verbose=False)
    return [
        Located(torch.tensor(one.ids, dtype=torch.int64), torch.from_numpy(_spans(text, one, pieces)))
        for text, one in zip(texts, encoded.encodings, strict=True)
    ]


def read_back(ids: Sequence[int], pieces: Pieces, *, shown: Collection[int] = ()) -> tuple[bytes, Int64[Tensor, "T 2"]]:
    """The text that `ids` stand for, and where each lies in it; special tokens are no text, except for those `shown`.

    A sequence that somebody wrote or cut may begin or end within a character, so this is no `str`.
    """
    parts = [b"" if i in pieces.special and i not in shown else pieces.of[i] for i in ids]
    return b"".join(parts), torch.from_numpy(_laid(parts))


def readable(data: bytes) -> str:
    """`data` as text of as many bytes: each byte that is part of no character is a question mark."""
    return data.decode(errors=UNREADABLE)


def _spans(text: str, encoding: Any, pieces: Pieces) -> Int64[np.ndarray, "T 2"]:
    """`encoding` is the tokenizer's own account of `text`."""
    around = np.array([part is None for part in encoding.sequence_ids], dtype=bool)  # a BOS, not written in the text
    parts = [b"" if out else pieces.of[i] for i, out in zip(encoding.ids, around.tolist(), strict=True)]
    data = text.encode()
    if b"".join(parts) == data:
        return _laid(parts)
    breaks = [n for n, i in enumerate(encoding.ids) if i in pieces.added and not around[n]]
    trimmed = _without_dummies(parts, breaks, data)
    return _by_characters(text, encoding, parts) if trimmed is None else _laid(trimmed)


def _laid(parts: Sequence[bytes]) -> Int64[np.ndarray, "T 2"]:
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return np.stack([ends[:-1], ends[1:]], -1)


def _without_dummies(parts: Sequence[bytes], breaks: Sequence[int], data: bytes) -> list[bytes] | None:
    """`parts` without the space put before each run between two `breaks`; None where that does not give the text."""
    trimmed, place = list(parts), 0
    for start, stop in _runs(len(parts), breaks):
        run = b"".join(parts[start:stop])
        for gone in (0, 1):
            until = place + len(run) - gone
            behind = data.startswith(parts[stop], until) if stop < len(parts) else until == len(data)
            if run[:gone].isspace() == bool(gone) and data[place:until] == run[gone:] and behind:
                break
        else:
            return None
        if gone:
            first = next(n for n in range(start, stop) if parts[n])
            trimmed[first] = parts[first][1:]
        place = until + (len(parts[stop]) if stop < len(parts) else 0)
    return trimmed


def _runs(tokens: int, breaks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The stretches before, between and behind the `breaks`; each ends where a break stands, the last at the end."""
    starts = [0, *(at + 1 for at in breaks)]
    return zip(starts, [*breaks, tokens], strict=True)


def _by_characters(text: str, encoding: Any, parts: Sequence[bytes]) -> Int64[np.ndarray, "T 2"]:
    """What can be found of `parts` near the tokenizer's offsets; an empty span for what reads otherwise there."""
    data, spans, place = text.encode(), [], 0
    offsets = _in_bytes(text)[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)]
    for part, (start, end) in zip(parts, offsets.tolist(), strict=True):
        before = len(part) - len(part.lstrip())
        tried = (at for at in (place, start - before) if at >= place and data.startswith(part, at))
        at = next((at for at in tried if part and _confirmed(part, at, start, end)), None)
        if at is not None:
            spans.append((at, at + len(part)))
            place = at + len(part)
        else:
            spans.append((place, place))
            place = place if not part or part.isspace() else max(place, end)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _confirmed(part: bytes, at: int, start: int, end: int) -> bool:
    """Whether offsets that may leave out spaces on either side, and cover whole characters, agree with `part` at `at`.

    Bytes alone do not say it: a normaliser that makes one space of three leaves a space that is there, and is not it.
    """
    stop = at + len(part)
    if part.isspace():
        return start == end or (start, end) == (at, stop)
    inner, outer = at + len(part) - len(part.lstrip()), at + len(part.rstrip())
    covered, equal = start <= inner and outer <= end, at <= start and end <= stop
    return covered and (equal or not _whole(part))


def _whole(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


def _in_bytes(text: str) -> Int64[np.ndarray, " characters_and_one"]:
    """The byte at which each character begins, and where the last ends."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])


def _unreadable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "?" * (error.end - error.start), error.end


codecs.register_error(UNREADABLE, _unreadable)
