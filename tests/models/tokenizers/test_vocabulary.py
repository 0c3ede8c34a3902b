"""Two tokenizers share ids when they read text alike, whatever the width of their models."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import VocabularyMismatch
from potstill.models.tokenizers.vocabulary import count_shared_ids


def bytes_in_order(order: list[str], *, specials: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *order])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = ["<a>", "<b>", "<c>"]


def test_a_tokenizer_shares_all_its_ids_with_itself(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert count_shared_ids(tiny_tokenizer, tiny_tokenizer) == 259


def test_tokens_that_only_one_side_has_at_the_end_are_cut_off() -> None:
    short, long = bytes_in_order(LETTERS, specials=SPECIALS), bytes_in_order(LETTERS, specials=SPECIALS)
    long.add_tokens(["<extra>", "<more>"])
    assert len(long) == 261
    assert count_shared_ids(short, long) == count_shared_ids(long, short) == 259


def test_the_same_tokens_in_another_order_are_refused_though_the_width_is_equal() -> None:
    swapped = [*LETTERS[1:], LETTERS[0]]
    one, other = (bytes_in_order(order, specials=SPECIALS) for order in (LETTERS, swapped))
    assert len(one) == len(other)
    with pytest.raises(VocabularyMismatch, match="different ids"):
        count_shared_ids(one, other)


def test_two_swapped_special_tokens_are_refused_though_all_text_reads_alike() -> None:
    one, other = (bytes_in_order(LETTERS, specials=order) for order in (SPECIALS, ["<a>", "<c>", "<b>"]))
    assert one("plain text").input_ids == other("plain text").input_ids
    with pytest.raises(VocabularyMismatch, match=r"id 1 is '<b>' for the teacher and '<c>' for the student"):
        count_shared_ids(one, other)
