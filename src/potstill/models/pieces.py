"""What each token of a tokenizer stands for, in bytes: the one thing in which any two tokenizers can be compared.

Read from how the tokenizer decodes: GPT-2's letters for bytes (a token may be half a character), SentencePiece's mark
for a space and its byte fallback (`<0xE2>`), WordPiece's mark of a word that goes on.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import UnsupportedModel

RAW = re.compile(r"<0x([0-9A-F]{2})>")
SILENT = ("Fuse", "Strip")  # these change a text as a whole, and no token by itself


class Pieces(NamedTuple):
    """`of[i]` are the bytes of id i, none where there is no such token.

    `added` ids are matched in the text before it is cut, `special` ones among them control; `raw` ids are the single
    bytes that a tokenizer falls back on.
    """

    of: list[bytes]
    added: frozenset[int]
    special: frozenset[int]
    raw: frozenset[int]


def pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """What the ids of `tokenizer` stand for.

    Raises: UnsupportedModel for a tokenizer that is not a fast one, or decodes in a way that is not known here.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModel(f"{type(tokenizer).__name__} does not say how it decodes; use a fast tokenizer")
    steps = list(_steps(tokenizer.backend_tokenizer.decoder))
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    of = [b""] * (max(vocabulary.values(), default=-1) + 1)
    spelt, by_bytes = _spelling(steps), any(step["type"] == "ByteLevel" for step in steps)
    for token, i in vocabulary.items():
        of[i] = token.encode() if by_bytes and i in added else spelt(token)
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    falls_back = any(step["type"] == "ByteFallback" for step in steps)
    raw = {i for token, i in vocabulary.items() if falls_back and RAW.fullmatch(token)}
    return Pieces(of, frozenset(added), frozenset(special), frozenset(raw))


def counterparts(first: Pieces, second: Pieces, *, also: Iterable[tuple[int, int]] = ()) -> Int64[Tensor, " V"]:
    """For each id of `first` the id of `second` that stands for the same bytes, -1 where there is none.

    Of several ids the one that is no byte fallback, then the lowest. Special tokens stand for no text; those that do
    the same (both end a text, both end a turn) are named by `also`.
    """
    known: dict[bytes, int] = {}
    ids = [i for i, text in enumerate(second.of) if text and i not in second.special]
    for i in sorted(ids, key=lambda i: (i in second.raw, i)):
        known.setdefault(second.of[i], i)
    found = [-1 if i in first.special else known.get(text, -1) for i, text in enumerate(first.of)]
    for ours, theirs in also:
        found[ours] = theirs
    return torch.tensor(found, dtype=torch.int64)


def _steps(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, those of a sequence one by one."""
    if decoder is not None:
        waiting = [json.loads(decoder.__getstate__())]
        while waiting:
            step = waiting.pop(0)
            waiting = [*step.get("decoders", []), *waiting]
            if step["type"] != "Sequence":
                yield step


def _spelling(steps: list[Mapping[str, Any]]) -> Callable[[str], bytes]:
    """How a token is turned into bytes.

    Raises: UnsupportedModel.
    """
    if any(step["type"] == "ByteLevel" for step in steps):
        return _byte_level
    spaces, prefix, falls_back = [], "", False
    for step in steps:
        kind = step["type"]
        if kind == "Metaspace":
            spaces.append((step["replacement"], " "))
        elif kind == "Replace" and "String" in step["pattern"]:
            spaces.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            falls_back = True
        elif kind == "WordPiece":
            prefix = step["prefix"]
        elif kind not in SILENT:
            raise UnsupportedModel(f"how a tokenizer decodes by {kind} is not known here; use one of another kind")

    def spelt(token: str) -> bytes:
        if falls_back and (byte := RAW.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for mark, text in spaces:
            token = token.replace(mark, text)
        return token.removeprefix(prefix).encode()

    return spelt


def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others for U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


LETTERS = _letters()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(LETTERS[letter] for letter in token)
    except KeyError:  # a token that was added later is written as it is
        return token.encode()
