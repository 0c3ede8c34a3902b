"""The bytes that each token of a tokenizer represents; with them potstill compares any two tokenizers.

The tokenizer's decoder determines them: GPT-2's letters for bytes (a token may be half a character), SentencePiece's
mark for a space and its byte fallback (`<0xE2>`), or WordPiece's prefix of a continued word.
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

BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
TEXT_LEVEL_STEPS = ("Fuse", "Strip")  # these change a whole text, not a single token


class TokenBytes(NamedTuple):
    """`by_id[i]` are the bytes of id i, empty if there is no such token.

    The tokenizer matches `added_ids` in the text before it splits the text; `special_ids` are control tokens.
    `byte_fallback_ids` are the single bytes of a tokenizer with byte fallback.
    """

    by_id: list[bytes]
    added_ids: frozenset[int]
    special_ids: frozenset[int]
    byte_fallback_ids: frozenset[int]

    def crop(self, size: int) -> "TokenBytes":
        """The ids below `size` alone."""
        sets = (self.added_ids, self.special_ids, self.byte_fallback_ids)
        return TokenBytes(self.by_id[:size], *(frozenset(i for i in ids if i < size) for ids in sets))


def read_token_bytes(tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    """The bytes of every id of `tokenizer`.

    Raises: UnsupportedModel for a slow tokenizer, or one with an unknown kind of decoder.
    """
    if not tokenizer.is_fast:
        raise UnsupportedModel(
            f"{type(tokenizer).__name__} has no decoder that potstill can read; use a fast tokenizer"
        )
    steps = list(_iterate_decoder_steps(tokenizer.backend_tokenizer.decoder))
    added_tokens = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab()
    bytes_by_id = [b""] * (max(vocabulary.values(), default=-1) + 1)
    decode_token, is_byte_level = _make_token_decoder(steps), any(step["type"] == "ByteLevel" for step in steps)
    for token, i in vocabulary.items():
        bytes_by_id[i] = token.encode() if is_byte_level and i in added_tokens else decode_token(token)
    special_ids = {i for i, token in added_tokens.items() if token.special} | set(tokenizer.all_special_ids)
    has_byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
    byte_fallback_ids = {i for token, i in vocabulary.items() if has_byte_fallback and BYTE_FALLBACK.fullmatch(token)}
    return TokenBytes(bytes_by_id, frozenset(added_tokens), frozenset(special_ids), frozenset(byte_fallback_ids))


def match_tokens(
    source: TokenBytes, target: TokenBytes, *, special_pairs: Iterable[tuple[int, int]] = ()
) -> Int64[Tensor, " V"]:
    """For each id of `source` the id of `target` with the same bytes, -1 if there is none.

    Among several ids it prefers one that is not a byte fallback, then the lowest. Special tokens represent no text;
    `special_pairs` names pairs with the same role (both end a text, both end a turn).
    """
    id_by_bytes: dict[bytes, int] = {}
    ids = [i for i, text in enumerate(target.by_id) if text and i not in target.special_ids]
    for i in sorted(ids, key=lambda i: (i in target.byte_fallback_ids, i)):
        id_by_bytes.setdefault(target.by_id[i], i)
    target_ids = [-1 if i in source.special_ids else id_by_bytes.get(text, -1) for i, text in enumerate(source.by_id)]
    for source_id, target_id in special_pairs:
        target_ids[source_id] = target_id
    return torch.tensor(target_ids, dtype=torch.int64)


def _iterate_decoder_steps(decoder: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder; those of a sequence follow one by one."""
    if decoder is not None:
        queue = [json.loads(decoder.__getstate__())]
        while queue:
            step = queue.pop(0)
            queue = [*step.get("decoders", []), *queue]
            if step["type"] != "Sequence":
                yield step


def _make_token_decoder(steps: list[Mapping[str, Any]]) -> Callable[[str], bytes]:
    """The function from a token to its bytes.

    Raises: UnsupportedModel for an unknown step.
    """
    if any(step["type"] == "ByteLevel" for step in steps):
        return _decode_byte_level
    replacements, word_prefix, has_byte_fallback = [], "", False
    for step in steps:
        kind = step["type"]
        if kind == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            has_byte_fallback = True
        elif kind == "WordPiece":
            word_prefix = step["prefix"]
        elif kind not in TEXT_LEVEL_STEPS:
            raise UnsupportedModel(f"the tokenizer's decoder step {kind} is not supported; use another tokenizer")

    def decode_token(token: str) -> bytes:
        if has_byte_fallback and (byte := BYTE_FALLBACK.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for mark, text in replacements:
            token = token.replace(mark, text)
        return token.removeprefix(word_prefix).encode()

    return decode_token


def _make_byte_decoder() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 as itself, the other bytes as U+0100 and on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other_bytes = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + offset): byte for offset, byte in enumerate(other_bytes)
    }


BYTE_DECODER = _make_byte_decoder()


def _decode_byte_level(token: str) -> bytes:
    try:
        return bytes(BYTE_DECODER[letter] for letter in token)
    except KeyError:  # an added token is written as it is
        return token.encode()
