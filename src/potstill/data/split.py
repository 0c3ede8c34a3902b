"""Train and validation shares that depend on the text alone: never on a seed, an order or what else is in the set.

A document is held out if the first 64 bits of its SHA-256 fall into the lowest twentieth. Equal documents so fall on
the same side. A set of fewer than `FEW` texts (a book, some books) would have no such share, so its texts are cut into
sections at blank lines, sections are held out, and what lies between two held-out sections stays one document.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby

from potstill.core.errors import DataError
from potstill.data.shapes import Document

SHARE = 0.05
FEW = 20
SECTIONS = 2_000  # how many to cut a set into, where that leaves them between these two lengths, in characters
SHORTEST, LONGEST = 1_000, 16_000
LEAST = 20  # sections, however short the text


def fingerprint(document: Document) -> bytes:
    """The SHA-256 of what a document says, whoever is to teach it."""
    said = {name: value for name, value in document.items() if name not in ("whole", "route")}
    return hashlib.sha256(json.dumps(said, ensure_ascii=False, sort_keys=True).encode()).digest()


def hidden(prints: Sequence[bytes], *, share: float = SHARE) -> list[bool]:
    """For each document whether it is held out; at least one is, and one is not, wherever two documents differ."""
    different = set(prints)
    if len(different) < 2:
        return [False] * len(prints)
    held = {one for one in different if below(one, share)} or {min(different)}
    held -= {max(different)}
    return [one in held for one in prints]


def below(fingerprint: bytes, share: float = SHARE) -> bool:
    """Whether a fingerprint, read as a fraction of one, lies below `share`."""
    return int.from_bytes(fingerprint[:8], "big") < share * 2**64


def runs(texts: Sequence[str], *, validation: bool) -> list[Document]:
    """The train or the validation share of a few texts, as documents; `whole` are those that end where a text does.

    Raises: DataError where the texts are too short to be cut in two.
    """
    total = sum(map(len, texts))
    size = max(1, min(max(total // SECTIONS, SHORTEST), LONGEST, total // LEAST))
    cut = [(number, section) for number, text in enumerate(texts) for section in sections(text, size)]
    held = hidden([fingerprint({"text": section}) for _, section in cut])
    last = {number: place for place, (number, _) in enumerate(cut)}
    documents = []
    for (number, side), group in groupby(range(len(cut)), key=lambda place: (cut[place][0], held[place])):
        places = list(group)
        if side == validation:
            text = "".join(cut[place][1] for place in places)
            documents.append({"text": text, "whole": places[-1] == last[number]})
    if not documents:
        raise DataError(f"{total} characters are too few to hold a validation share; use split=all")
    return documents


def sections(text: str, size: int) -> list[str]:
    """`text` cut into pieces of at least `size` characters and at most twice as many; joined, they are the text.

    A piece ends after a blank line if it can, else after a line, else after a word, else anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > 2 * size:
        window = text[start : start + 2 * size]
        ends = (window.find(mark, size) + len(mark) for mark in ("\n\n", "\n", " ") if mark in window[size:])
        stop = start + next(ends, size)
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]] if text[start:].strip() or not pieces else [*pieces[:-1], pieces[-1] + text[start:]]
