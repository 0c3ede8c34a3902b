r"""Final answers in text: finds them, reads their numbers, and compares them.

The answer of a text is the content of its last `\boxed{}`, or else its last number. Numbers are exact fractions:

| text | value | | text | value |
|---|---|---|---|---|
| `1,234.5`, `1.234,5`, `1 234,5` (narrow or no-break space) | 1234.5 | | `3,5` | 3.5 |
| `1,234`, `1.234.567`, `12,34,567` | groups of digits | | `1.234`, `0,123` | decimals |
| `3/4`, `\frac{3}{4}`, `\frac34` | 3/4 | | `1\frac{1}{2}`, `1 1/2` | 3/2 |
| `$1,200`, `18 \text{ dollars}`, `x = 18` | 1200, 18, 18 | | `٤٢`, `４２`, `๔๒` | 42 |

With one separator alone, three digits after a comma are a group and three digits after a point are decimals. A percent
sign is kept aside: 50% equals 50 and 1/2. Numbers of more than 300 digits are none.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Any, NamedTuple

MAX_DIGITS = 300  # of a number, also of an exponent's zeros; Python refuses to read more than 4,300
SPACES = "\u00a0\u202f\u2009"
GROUP_MARKS = f"{SPACES}'’"
CURRENCIES = "$€£¥₹₩฿"

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
DIGITS = rf"(?:\d+(?:[.,{GROUP_MARKS}]\d+)*|(?<!\d)\.\d+)(?:[eE][+-]?\d{{1,3}}(?!\d))?"
SIGN = r"[-−–]"
PERCENT = r"\s?\\?%"
NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}.,])(?P<sign>{SIGN}))?(?<![A-Za-z_])(?P<digits>{DIGITS})(?:/(?P<below>\d+)(?![\d/]))?"
    rf"(?P<percent>{PERCENT})?"
)
GROUPED = re.compile(rf"[1-9]\d{{0,2}}([.,{GROUP_MARKS}])\d{{3}}(?:\1\d{{3}})*|[1-9]\d?(?:,\d{{2}})+,\d{{3}}")
LATEX_FRACTION = re.compile(
    rf"(?P<sign>{SIGN})?\s*(?P<whole>\d+)?\s*\\[dt]?frac\s*"
    r"(?:\{\s*(?P<above>-?[\d.,]+)\s*\}|(?P<digit_above>\d))\s*(?:\{\s*(?P<below>[\d.,]+)\s*\}|(?P<digit_below>\d))"
)
WHOLE_NUMBER = re.compile(
    rf"[{CURRENCIES}\s]*(?P<sign>[-−–+])?[{CURRENCIES}\s]*(?:(?P<whole>\d+)\s+(?=\d+/\d))?(?P<digits>{DIGITS})"
    rf"(?:\s*/\s*(?P<below>{DIGITS}))?(?P<percent>{PERCENT})?(?![A-Za-z](?![A-Za-z]))[^\d=<>+*/^\\(){{}}\[\],⁰¹²³⁴-⁹√π]*"
)
LATEX_WORDS = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{([^{}]*)\}")
DROPPED_MARKS = (r"\,", r"\!", r"\;", r"\:", r"\left", r"\right")
LATEX_MARKS = {"{,}": ",", r"\ ": " ", r"\$": "$", **dict.fromkeys(DROPPED_MARKS, "")}
SEPARATORS = {"٫": ".", "٬": ",", "٪": "%", "％": "%"}  # of other scripts
DEGREES = re.compile(r"\^\s*\{?\\circ\}?|°")


class Number(NamedTuple):
    """A number as an exact fraction. A percentage has its number before the percent sign as `value`."""

    value: Fraction
    is_percent: bool = False

    def equals(self, other: "Number") -> bool:
        """Whether both are equal; a percentage equals a plain number of its own value, or of a hundredth of it."""
        if self.is_percent == other.is_percent:
            return self.value == other.value
        percentage, plain = (self, other) if self.is_percent else (other, self)
        return plain.value in (percentage.value, percentage.value / 100)


class Answer(NamedTuple):
    """An answer that was read: the number that it is, if it is one, and its string without formatting."""

    number: Number | None
    text: str

    def matches(self, other: "Answer") -> bool | None:
        """Whether two answers are equal, as numbers or as strings.

        None where they are not both numbers and their strings differ, so that only mathematics could show that they
        are equal.
        """
        if self.number is not None and other.number is not None:
            return self.number.equals(other.number)
        return True if self.text == other.text else None


def extract_answer(text: str) -> str | None:
    r"""The content of the last `\boxed{}` of a text, or else its last number; None without either."""
    box = find_boxed(text)
    if box is not None:
        return box
    numbers = list(NUMBER.finditer(to_plain_digits(text)))
    return numbers[-1].group() if numbers else None


def find_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` whose braces close; None without one."""
    for match in reversed(list(BOX.finditer(text))):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position]
    return None


def read_reference(value: Any) -> str:
    r"""The final answer of a data set's column: what follows `####` (GSM8K), or is inside `\boxed{}`, or all of it."""
    text = str(value).strip()
    box = find_boxed(text)
    return text.rpartition("####")[2].strip() if box is None else box


def match_answers(answer: str, reference: str) -> bool | None:
    """Whether two answers are equal; None where only mathematics could show it (`Answer.matches`)."""
    return read_answer(answer).matches(read_answer(reference))


def read_answer(text: str) -> Answer:
    """The number and the string of an answer."""
    return Answer(parse_number(text), normalize_text(text))


def find_numbers(text: str) -> list[Number]:
    """The numbers of a text in their order; a part of an identifier such as `x2` is none."""
    return [number for match in NUMBER.finditer(to_plain_digits(text)) for number in _read_match(match)]


def parse_number(text: str) -> Number | None:
    """The number that an answer is, with its sign, currency or unit; None for any other answer."""
    text = clean_latex(to_plain_digits(text)).strip().strip("$").strip().rstrip(".")
    text = re.split(r"=|≈|\\approx", text)[-1].strip()
    if match := LATEX_FRACTION.fullmatch(text):
        above, below = (
            _read_digits(match[a] or match[b]) for a, b in (("above", "digit_above"), ("below", "digit_below"))
        )
    elif match := WHOLE_NUMBER.fullmatch(text):
        above, below = _read_digits(match["digits"]), _read_digits(match["below"] or "1")
    else:
        return None
    if above is None or not below:
        return None
    value = Fraction(int(match["whole"] or 0)) + above / below
    is_percent = bool(match.groupdict().get("percent"))
    return Number(-value if match["sign"] not in (None, "+") else value, is_percent)


def clean_latex(text: str) -> str:
    r"""A text without LaTeX's spaces, sizes, degrees and `\text{}`, whose content stays."""
    text = LATEX_WORDS.sub(r"\1", text)
    for mark, plain in LATEX_MARKS.items():
        text = text.replace(mark, plain)
    return DEGREES.sub("", text)


def normalize_text(text: str) -> str:
    """An answer in lower case, without LaTeX's formatting, spaces and a full stop."""
    text = clean_latex(text).replace("dfrac", "frac").replace("tfrac", "frac").replace("$", "")
    return re.sub(r"\s+", "", text).rstrip(".").casefold()


def to_plain_digits(text: str) -> str:
    """The text with the decimal digits of every script as 0 to 9, and their separators and percent signs likewise."""
    return text if text.isascii() else "".join(map(_to_plain_character, text))


def _to_plain_character(char: str) -> str:
    digit = None if char.isascii() else unicodedata.decimal(char, None)
    return SEPARATORS.get(char, char) if digit is None else str(digit)


def _read_match(match: re.Match[str]) -> list[Number]:
    """The number that was matched, or those of a list such as `1,2,3`."""
    value = _read_digits(match["digits"])
    if value is None:
        parts = [part for part in re.findall(r"\d+", match["digits"]) if len(part) <= MAX_DIGITS]
        return [Number(Fraction(part)) for part in parts]
    below = _read_digits(match["below"] or "1")
    value = value / below if below else value
    return [Number(-value if match["sign"] else value, bool(match["percent"]))]


def _read_digits(text: str) -> Fraction | None:
    """The value of digits with separators and an exponent; None if they are no number, or one of too many digits."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_DIGITS:
        return None
    whole, fraction = _split_decimals(mantissa)
    if not (whole.lstrip("-").isdigit() or GROUPED.fullmatch(whole) or not whole) or not (whole or fraction):
        return None
    digits = re.sub(r"[^\d-]", "", whole) or "0"
    return Fraction(f"{digits}.{fraction or '0'}") * Fraction(10) ** int(exponent or 0)


def _split_decimals(mantissa: str) -> tuple[str, str]:
    """Digits with separators as the part before the decimal separator, and the decimals."""
    marks = re.findall(r"[^\d-]", mantissa)
    if not marks:
        return mantissa, ""
    last = marks[-1]
    is_alone = len(marks) == 1 and (last == "." or (last == "," and not GROUPED.fullmatch(mantissa)))
    is_second = len(set(marks)) > 1 and marks.count(last) == 1 and last in ".,"
    if not (is_alone or is_second):
        return mantissa, ""
    whole, _, fraction = mantissa.rpartition(last)
    return whole, fraction
