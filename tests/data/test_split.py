"""The shares are disjoint, complete, and depend on nothing but the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potstill.core.errors import DataError
from potstill.data.split import VALIDATION_SHARE, choose_held_out, cut_sections, fingerprint, split_texts

TEXTS = st.text(alphabet="ab \n", min_size=0, max_size=200)


def texts_of(n: int) -> list[str]:
    """A text of n numbered paragraphs."""
    return ["".join(f"paragraph {i} of a book\n\n" for i in range(n))]


@given(TEXTS, st.integers(1, 20))
def test_sections_joined_are_the_text(text: str, size: int) -> None:
    pieces = cut_sections(text, size)
    assert "".join(pieces) == text
    assert all(size <= len(piece) <= 2 * size for piece in pieces[:-1])


def test_a_section_ends_after_a_blank_line_then_a_line_then_a_word() -> None:
    assert cut_sections("aaaa b\ncc\n\n" + "d" * 9, 4)[0] == "aaaa b\n"
    assert cut_sections("aaaa\n\nbb cc ddddd", 4)[0] == "aaaa\n\n"
    assert cut_sections("aaaaaa bb cc ddddd", 4)[0] == "aaaaaa "
    assert cut_sections("a" * 20, 4)[0] == "aaaa"


def test_about_a_twentieth_is_held_out() -> None:
    held = choose_held_out([fingerprint({"text": str(i)}) for i in range(4000)])
    assert sum(held) == pytest.approx(4000 * VALIDATION_SHARE, rel=0.2)


def test_whether_a_document_is_held_out_does_not_depend_on_the_others() -> None:
    prints = [fingerprint({"text": str(i)}) for i in range(1000)]
    all_of_them, some = choose_held_out(prints), choose_held_out(prints[200:700])
    assert some == all_of_them[200:700]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8))
def test_wherever_two_documents_differ_neither_share_is_empty(texts: list[str]) -> None:
    held = choose_held_out([fingerprint({"text": text}) for text in texts])
    assert (len(set(texts)) > 1) == (True in held)
    assert False in held


def test_a_share_of_all_still_leaves_one_to_train_on() -> None:
    prints = [fingerprint({"text": str(i)}) for i in range(10)]
    assert sum(choose_held_out(prints, share=1.0)) == 9


def test_equal_documents_fall_on_the_same_side() -> None:
    texts = [str(i % 50) for i in range(200)]
    held = choose_held_out([fingerprint({"text": text}) for text in texts])
    assert len({(text, side) for text, side in zip(texts, held, strict=True)}) == 50


def test_the_end_of_a_section_is_no_part_of_what_it_says() -> None:
    assert fingerprint({"text": "a", "whole": True}) == fingerprint({"text": "a", "whole": False})
    assert fingerprint({"text": "a"}) != fingerprint({"text": "b"})


@pytest.mark.parametrize("n", [60, 300, 3000])
def test_a_book_is_cut_into_train_and_validation_that_hold_each_paragraph_once(n: int) -> None:
    (text,) = texts_of(n)
    train, held = split_texts([text], validation=False), split_texts([text], validation=True)
    assert sum(len(one["text"]) for one in [*train, *held]) == len(text)
    assert 0 < sum(len(one["text"]) for one in held) < 0.2 * len(text)
    assert all(one["text"] in text for one in [*train, *held])
    assert sum(one["whole"] for one in [*train, *held]) == 1


def test_what_lies_between_two_held_out_sections_stays_one_document() -> None:
    (text,) = texts_of(3000)
    train, held = split_texts([text], validation=False), split_texts([text], validation=True)
    assert abs(len(train) - len(held)) <= 1


def test_two_books_never_run_into_one_another() -> None:
    texts = [*texts_of(300), "another book\n\n" * 400]
    documents = [*split_texts(texts, validation=False), *split_texts(texts, validation=True)]
    assert sum(one["whole"] for one in documents) == 2
    assert not any("of a book" in one["text"] and "another" in one["text"] for one in documents)


def test_a_text_that_cannot_be_cut_is_trained_on_whole_and_has_no_validation_share() -> None:
    assert split_texts(["a"], validation=False) == [{"text": "a", "whole": True}]
    with pytest.raises(DataError, match="1 characters are too few"):
        split_texts(["a"], validation=True)


@settings(max_examples=30)
@given(st.lists(TEXTS.filter(bool), min_size=1, max_size=3))
def test_any_few_texts_are_shared_out_without_loss(texts: list[str]) -> None:
    train = split_texts(texts, validation=False)
    try:
        held = split_texts(texts, validation=True)
    except DataError:
        held = []
    assert sorted("".join(one["text"] for one in [*train, *held])) == sorted("".join(texts))
