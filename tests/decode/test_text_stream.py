"""Streamed pieces are together the decoded text, with whole characters, and never hold a part of a stop string."""

import pytest
from transformers import PreTrainedTokenizerFast

from potstill.decode.text_stream import TextStream


def push_all(stream: TextStream, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stop_string is not None:
            break
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("text", ["plain words", "naïve 😀 日本語", " two  spaces ", "a\n\nb", ""])
def test_the_pieces_are_the_whole_text_in_whole_characters(text: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = push_all(TextStream(tiny_tokenizer), tiny_tokenizer(text).input_ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_have_no_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tiny_tokenizer("ab").input_ids, tiny_tokenizer.eos_token_id, *tiny_tokenizer("c").input_ids]
    assert "".join(push_all(TextStream(tiny_tokenizer), ids)) == "abc"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stop"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["three", "two t"], "one ", "two t"),
        ("aab aabaab", ["aabaa"], "aab ", "aabaa"),
        ("ends with tw", ["two"], "ends with tw", None),
        ("nothing", ["", "x"], "nothing", None),
        ("é!", ["é"], "", "é"),
    ],
)
def test_a_stop_string_ends_the_text_across_tokens(
    text: str, stops: list[str], expected: str, stop: str | None, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    stream = TextStream(tiny_tokenizer, stops)  # every token is one byte, so each stop string spans several
    pieces = push_all(stream, tiny_tokenizer(text).input_ids)
    assert "".join(pieces) == expected
    assert stream.stop_string == stop


def test_text_that_may_begin_a_stop_string_is_held_until_it_cannot(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tiny_tokenizer, ["END"])
    assert [stream.push(token) for token in tiny_tokenizer("aENxEN").input_ids] == ["a", "", "", "ENx", "", ""]
    assert stream.flush() == "EN"


def test_an_incomplete_character_at_the_end_is_shown(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer("a😀").input_ids[:-1]
    assert "".join(push_all(TextStream(tiny_tokenizer), ids)) == tiny_tokenizer.decode(ids)
