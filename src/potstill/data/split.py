"""Splits a corpus into train and validation shares by the text of each document: no seed and no order matters.

A document is held out if the first 64 bits of its SHA-256 fall into the lowest twentieth, so equal documents are on the
same side. A set of fewer than `MIN_DOCUMENTS` texts (such as a book) is too small for that. Its texts are cut into
sections at blank lines, and sections are held out. The text between two held-out sections stays one document.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from potstill.core.errors import DataError
from potstill.data.pack_fields import LABEL_FIELDS
from potstill.data.schema import Document
from potstill.data.turns import drop_nulls, to_messages

VALIDATION_SHARE = 0.05
MIN_DOCUMENTS = 20
TARGET_SECTIONS = 2_000  # sections of a set, if their lengths stay between the next two
MIN_SECTION_LENGTH, MAX_SECTION_LENGTH = 1_000, 16_000  # characters
MIN_SECTIONS = 20  # even of a short text


def fingerprint(document: Document) -> bytes:
    """The SHA-256 of a document's text, without its labels."""
    content = drop_nulls({name: value for name, value in document.items() if name not in ("whole", *LABEL_FIELDS)})
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).digest()


def hash_content(document: Mapping[str, Any]) -> bytes:
    """The SHA-256 of what a document says, whether as a pair or as a chat, without the spaces around its parts.

    Of a preference only the prompt counts, so that all answers to one prompt are on the same side of a split. So does
    that of a row of prompts.
    """
    messages = document["prompt"] if "chosen" in document or "row" in document else None
    parts = (
        [document["text"].strip()]
        if "text" in document
        else [
            (message["role"], message["content"].strip(), message.get("tool_calls"))
            for message in to_messages(document if messages is None else {"messages": messages})
        ]
    )
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def choose_held_out(fingerprints: Sequence[bytes], *, share: float = VALIDATION_SHARE, least: int = 1) -> list[bool]:
    """Whether each document is held out. If two documents differ, at least one is held out and at least one is not.

    Of the distinct ones at least `least` are held out, unless fewer than half as many would be left.
    """
    distinct = sorted(set(fingerprints))
    if len(distinct) < 2:
        return [False] * len(fingerprints)
    least = max(1, min(least, len(distinct) // 2))
    held_out = {digest for digest in distinct if is_in_share(digest, share)} | {*distinct[:least]}
    held_out -= {distinct[-1]}
    return [digest in held_out for digest in fingerprints]


def is_in_share(digest: bytes, share: float = VALIDATION_SHARE) -> bool:
    """Whether a fingerprint, read as a binary fraction in [0, 1), is below `share`."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_texts(texts: Sequence[str], *, validation: bool) -> list[Document]:
    """The train or the validation share of a few texts, as documents. `whole` marks those that end with a text.

    Raises: DataError if the texts are too short to hold out a part.
    """
    total = sum(map(len, texts))
    size = max(1, min(max(total // TARGET_SECTIONS, MIN_SECTION_LENGTH), MAX_SECTION_LENGTH, total // MIN_SECTIONS))
    numbered_sections = [(number, section) for number, text in enumerate(texts) for section in cut_sections(text, size)]
    held_out = choose_held_out([fingerprint({"text": section}) for _, section in numbered_sections])
    last_section = {number: index for index, (number, _) in enumerate(numbered_sections)}
    documents = []
    for (number, is_held_out), group in groupby(
        range(len(numbered_sections)), key=lambda index: (numbered_sections[index][0], held_out[index])
    ):
        indices = list(group)
        if is_held_out == validation:
            text = "".join(numbered_sections[index][1] for index in indices)
            documents.append({"text": text, "whole": indices[-1] == last_section[number]})
    if not documents:
        raise DataError(f"{total} characters are too few to hold out a share; give more text")
    return documents


def cut_sections(text: str, size: int) -> list[str]:
    """Cuts `text` into pieces of `size` to twice `size` characters. Joined, they are the text.

    A piece ends after a blank line if there is one, else after a line, else after a word, else anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > 2 * size:
        window = text[start : start + 2 * size]
        ends = (
            window.find(separator, size) + len(separator)
            for separator in ("\n\n", "\n", " ")
            if separator in window[size:]
        )
        stop = start + next(ends, size)
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]] if text[start:].strip() or not pieces else [*pieces[:-1], pieces[-1] + text[start:]]
