r"""Final answers: which part of a text is the answer, what number it is, and which answers are equal."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from potstill.data.answers import (
    Number,
    extract_answer,
    find_boxed,
    find_numbers,
    match_answers,
    parse_number,
    read_reference,
)
from potstill.data.math_strings import normalize_math


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{3}, but then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"So \boxed{x^{2}+\sqrt{y_{1}}} holds, for 7", r"x^{2}+\sqrt{y_{1}}"),
        (r"a complete \boxed{4} and a cut \boxed{12", "4"),
        ("Janet has 16 - 3 - 4 = 9 eggs.", "9"),
        ("#### 1,234", "1,234"),
        ("It is -5.", "-5"),
        ("x2 and GSM8K name no number", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_box_or_else_the_last_number(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("18", "18"), ("-18", "-18"), ("+18", "18"), ("−18", "-18"), ("18.0", "18"), (".5", "1/2"), ("007", "7")),
        *(("1,234", "1234"), ("1,234.5", "2469/2"), ("1.234,5", "2469/2"), ("1.234.567", "1234567")),
        *(("12,34,567", "1234567"), ("1 234,5".replace(" ", "\u202f"), "2469/2"), ("1’234", "1234")),
        *(("3,5", "7/2"), ("0,123", "123/1000"), ("1.234", "617/500"), (r"1{,}234", "1234"), (r"12\,345", "12345")),
        *(("3/4", "3/4"), (r"\frac{3}{4}", "3/4"), (r"-\dfrac34", "-3/4"), (r"1\frac{1}{2}", "3/2"), ("1 1/2", "3/2")),
        *(("$1,200", "1200"), ("€ 5", "5"), (r"\$18", "18"), (r"18 \text{ dollars}", "18"), ("18 apples", "18")),
        *(("x = 18", "18"), (r"90^\circ", "90"), ("1.5e3", "1500"), ("٤٢", "42"), ("４２", "42"), ("๔๒", "42")),
    ],
)
def test_a_number_is_read_by_its_value(text: str, value: str) -> None:
    assert parse_number(text) == Number(Fraction(value))


@pytest.mark.parametrize(
    "text", ["", "x > 5", "(3, 4)", "1,2,3", "2x", "x^2", "Paris", r"\sqrt{2}", "1/0", "9" * 5000, "1e99999", "5²"]
)
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("first", "second", "is_equal"),
    [
        ("50%", "50", True),
        ("50%", "1/2", True),
        (r"50\%", "50%", True),
        ("50%", "0.5%", False),
        ("1,000", "1000.00", True),
        ("0.333", "1/3", False),
        (r"\text{Paris}", "paris.", True),
        (r"\left(3, \dfrac{\pi}{2}\right)", r"(3,\frac{\pi}{2})", True),
        ("(x+1)^2", "x^2+2x+1", None),
        ("Paris", "Rome", None),
    ],
)
def test_answers_are_equal_by_value_or_as_strings(first: str, second: str, is_equal: bool | None) -> None:
    assert match_answers(first, second) is is_equal
    assert match_answers(second, first) is is_equal


@pytest.mark.parametrize(
    ("column", "reference"),
    [
        (18, "18"),
        (18.5, "18.5"),
        ("9 eggs a day <<9*2=18>>18.\n#### 18", "18"),
        (r"so \boxed{18}", "18"),
        (" 18 ", "18"),
    ],
)
def test_a_column_gives_its_final_answer(column: object, reference: str) -> None:
    assert read_reference(column) == reference


def test_all_numbers_of_a_text_are_found_in_their_order() -> None:
    text = "10-4=6 eggs, at $2.50 each: 6 * 2.50 = 15,00; 1,2,3; 3–5; -7, 20%"
    values = [float(number.value) for number in find_numbers(text)]
    assert values == [10, 4, 6, 2.5, 6, 2.5, 15, 1, 2, 3, 3, 5, -7, 20]
    assert find_numbers("20%")[0].is_percent


@given(st.integers(min_value=-(10**15), max_value=10**15), st.integers(min_value=0, max_value=6))
def test_what_python_writes_is_read_back(number: int, decimals: int) -> None:
    value = Fraction(number, 10**decimals)
    text = f"{number // 1:,}" if decimals == 0 else f"{value.numerator / value.denominator:.{decimals}f}"
    parsed = parse_number(text)
    assert parsed is not None
    assert parsed.value == Fraction(text.replace(",", ""))


@given(st.text(alphabet="0123456789.,'%$\\{}fracboxed /-–^_ \u202f٤eE=", max_size=40))
def test_no_text_breaks_the_readers(text: str) -> None:
    extract_answer(text)
    find_numbers(text)
    parse_number(text)
    find_boxed(text)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        ("0.5", r"\frac{1}{2}"),
        ("3/4", r"\frac{3}{4}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\sqrt3", r"\sqrt{3}"),
        (r"x = 5", "5"),
        (r"90^\circ", "90"),
        (r"\$1.50\text{ dollars}", "1.50"),
        (r"50\%", "50"),
        (r"\left( 3, \, .5 \right)", r"(3,\,0.5)"),
    ],
)
def test_strings_have_the_form_of_the_math_data_set(text: str, form: str) -> None:
    assert normalize_math(text) == form
