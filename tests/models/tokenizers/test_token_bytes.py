"""What tokens stand for, read from how each kind of tokenizer decodes."""

import pytest
from tests.data.trained import EXACT, byte_level, sentencepiece, unigram, wordpiece
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import UnsupportedModel
from potstill.models.tokenizers.token_bytes import BYTE_DECODER, TokenBytes, match_tokens, read_token_bytes


def test_the_letters_for_bytes_are_those_of_the_library() -> None:
    assert sorted(BYTE_DECODER) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_DECODER.values()) == list(range(256))
    for letter, byte in BYTE_DECODER.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([letter]) == chr(byte)


@pytest.mark.parametrize("make", EXACT.values(), ids=list(EXACT))
def test_the_pieces_of_a_text_are_what_its_tokens_decode_to(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    text = "The dog. 世界 é 🎉👩‍👩‍👧  spaces\n\tx"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(read_token_bytes(tokenizer).by_id[i] for i in ids).decode().removeprefix(" ") == text


@pytest.mark.parametrize(
    ("tokenizer", "token", "text"),
    [
        (byte_level(), "Ġ", b" "),
        (byte_level(), "Ã", b"\xc3"),
        (byte_level(), "<|im_end|>", b"<|im_end|>"),
        (sentencepiece(), "▁", b" "),
        (sentencepiece(), "<0xE2>", b"\xe2"),
        (unigram(), "▁", b" "),
        (wordpiece(), "##e", b"e"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_token_stands_for_its_bytes(tokenizer: PreTrainedTokenizerFast, token: str, text: bytes) -> None:
    assert read_token_bytes(tokenizer).by_id[tokenizer.get_vocab()[token]] == text


def test_byte_fallback_and_special_tokens_are_told_from_the_others() -> None:
    found, vocabulary = read_token_bytes(sentencepiece()), sentencepiece().get_vocab()
    assert len(found.byte_fallback_ids) == 256
    assert vocabulary["<0x41>"] in found.byte_fallback_ids
    assert {vocabulary[token] for token in ("<s>", "</s>", "<unk>")} <= found.special_ids <= found.added_ids
    assert not read_token_bytes(byte_level()).byte_fallback_ids


def test_ids_of_the_same_bytes_are_counterparts_and_byte_fallback_comes_last() -> None:
    first = TokenBytes([b"</s>", b"a", b"b", b"", b"\xe2"], frozenset({0}), frozenset({0}), frozenset())
    second = TokenBytes([b"a", b"\xe2", b"</s>", b"a", b"a"], frozenset({2}), frozenset({2}), frozenset({0, 1}))
    assert match_tokens(first, second).tolist() == [-1, 3, -1, -1, 1]
    assert match_tokens(first, second, special_pairs=[(0, 2)]).tolist() == [2, 3, -1, -1, 1]


def test_of_a_tokenizer_and_itself_every_token_is_its_own_counterpart() -> None:
    found = read_token_bytes(byte_level())
    table = match_tokens(found, found).tolist()
    assert all(there == (-1 if i in found.special_ids else i) for i, there in enumerate(table))


def test_an_unknown_way_to_decode_is_refused_by_name() -> None:
    tokenizer = sentencepiece.__wrapped__()
    tokenizer.backend_tokenizer.decoder = decoders.CTC()
    with pytest.raises(UnsupportedModel, match="CTC"):
        read_token_bytes(tokenizer)
