"""Finds the bytes of a text that each token covers.

The bytes of tokens (`TokenBytes`) give exact spans wherever the joined tokens equal the text; a
byte-level tokenizer's own offsets are only those of whole characters. A space that SentencePiece adds before a text or
after a special token is not in the text, and covers no bytes. Where a tokenizer normalizes the text (NFC, lower case),
tokens are searched near the tokenizer's offsets. A token that differs from the text there (a composed accent, an
unknown character) gets an empty span, so nothing is paired by a guess.
"""

import codecs
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.models.tokenizers.token_bytes import TokenBytes

UNREADABLE_HANDLER = "potstill.unreadable"  # the name of the error handler below


class LocatedTokens(NamedTuple):
    """Tokens, and the bytes `[start, end)` of the UTF-8 text that each covers; empty for a token without text."""

    ids: Int64[Tensor, " T"]
    spans: Int64[Tensor, "T 2"]


def locate_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, pieces: TokenBytes, *, add_special_tokens: bool = True
) -> list[LocatedTokens]:
    """Tokenizes `texts`, and locates each token. `add_special_tokens` adds those that the tokenizer puts around a text.

    Spans ascend and do not overlap. A special token that is written out in a text covers its characters.
    """
    if not texts:
        return []
    batch_encoding = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
    return [
        LocatedTokens(
            torch.tensor(encoding.ids, dtype=torch.int64), torch.from_numpy(_find_spans(text, encoding, pieces))
        )
        for text, encoding in zip(texts, batch_encoding.encodings, strict=True)
    ]


def decode_with_spans(
    ids: Sequence[int], pieces: TokenBytes, *, visible_ids: Collection[int] = ()
) -> tuple[bytes, Int64[Tensor, "T 2"]]:
    """The bytes of the text of `ids`, and the span of each. Special tokens are not text, except for `visible_ids`.

    A sequence that was sampled or cut may begin or end within a character, so the text is not a `str`.
    """
    parts = [b"" if i in pieces.special_ids and i not in visible_ids else pieces.by_id[i] for i in ids]
    return b"".join(parts), torch.from_numpy(_compute_consecutive_spans(parts))


def to_readable_text(data: bytes) -> str:
    """`data` as a text of as many bytes, with a question mark for each byte that is not part of a character."""
    return data.decode(errors=UNREADABLE_HANDLER)


def _find_spans(text: str, encoding: Any, pieces: TokenBytes) -> Int64[np.ndarray, "T 2"]:
    """The spans of the tokens in `encoding`, which is the tokenizer's result for `text`."""
    is_outside = np.array(
        [part is None for part in encoding.sequence_ids], dtype=bool
    )  # such as a BOS, which is not in the text
    parts = [b"" if outside else pieces.by_id[i] for i, outside in zip(encoding.ids, is_outside.tolist(), strict=True)]
    data = text.encode()
    if b"".join(parts) == data:
        return _compute_consecutive_spans(parts)
    breaks = [n for n, i in enumerate(encoding.ids) if i in pieces.added_ids and not is_outside[n]]
    trimmed_parts = _strip_dummy_spaces(parts, breaks, data)
    return (
        _match_by_offsets(text, encoding, parts) if trimmed_parts is None else _compute_consecutive_spans(trimmed_parts)
    )


def _compute_consecutive_spans(parts: Sequence[bytes]) -> Int64[np.ndarray, "T 2"]:
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return np.stack([ends[:-1], ends[1:]], -1)


def _strip_dummy_spaces(parts: Sequence[bytes], breaks: Sequence[int], data: bytes) -> list[bytes] | None:
    """`parts` without the space added before each run between two `breaks`; None if they do not give the text then."""
    trimmed_parts, position = list(parts), 0
    for start, stop in _split_runs(len(parts), breaks):
        run = b"".join(parts[start:stop])
        for num_spaces in (0, 1):
            end = position + len(run) - num_spaces
            is_followed = data.startswith(parts[stop], end) if stop < len(parts) else end == len(data)
            if (
                run[:num_spaces].isspace() == bool(num_spaces)
                and data[position:end] == run[num_spaces:]
                and is_followed
            ):
                break
        else:
            return None
        if num_spaces:
            first_index = next(n for n in range(start, stop) if parts[n])
            trimmed_parts[first_index] = parts[first_index][1:]
        position = end + (len(parts[stop]) if stop < len(parts) else 0)
    return trimmed_parts


def _split_runs(num_tokens: int, breaks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs before, between and after the `breaks`, as (start, stop)."""
    starts = [0, *(break_index + 1 for break_index in breaks)]
    return zip(starts, [*breaks, num_tokens], strict=True)


def _match_by_offsets(text: str, encoding: Any, parts: Sequence[bytes]) -> Int64[np.ndarray, "T 2"]:
    """The spans of `parts` found near the tokenizer's offsets; an empty span for a part that is not there."""
    data, spans, position = text.encode(), [], 0
    offsets = _compute_byte_offsets(text)[np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)]
    for part, (start, end) in zip(parts, offsets.tolist(), strict=True):
        num_spaces = len(part) - len(part.lstrip())
        candidates = (
            match for match in (position, start - num_spaces) if match >= position and data.startswith(part, match)
        )
        match = next((match for match in candidates if part and _is_confirmed(part, match, start, end)), None)
        if match is not None:
            spans.append((match, match + len(part)))
            position = match + len(part)
        else:
            spans.append((position, position))
            position = position if not part or part.isspace() else max(position, end)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _is_confirmed(part: bytes, position: int, start: int, end: int) -> bool:
    """Whether the tokenizer's offsets agree with `part` at `position`.

    Offsets may leave out spaces on either side, and cover whole characters. Equal bytes are not enough: if a normalizer
    merges three spaces into one, the text has a space at `position` that is not the token's.
    """
    stop = position + len(part)
    if part.isspace():
        return start == end or (start, end) == (position, stop)
    inner_start, outer_end = position + len(part) - len(part.lstrip()), position + len(part.rstrip())
    is_covered, is_equal = start <= inner_start and outer_end <= end, position <= start and end <= stop
    return is_covered and (is_equal or not _is_utf8(part))


def _is_utf8(part: bytes) -> bool:
    try:
        part.decode()
    except UnicodeDecodeError:
        return False
    return True


def _compute_byte_offsets(text: str) -> Int64[np.ndarray, " characters_and_one"]:
    """The byte offset of each character, and of the end of the text."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])


def _replace_unreadable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "?" * (error.end - error.start), error.end


codecs.register_error(UNREADABLE_HANDLER, _replace_unreadable)
