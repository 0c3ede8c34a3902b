r"""The string normalization of the MATH data set, by which the released rewards of reasoning models compare answers.

Source: Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset" (arXiv:2103.03874), and the
function `strip_string` of its code. `data.answers` compares by value, which is better; this is for published numbers.
"""

import re

REPLACEMENTS = (
    *(("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")),
    *((r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""), (r"\$", "")),
)
PERCENTS_AND_POINTS = ((r"\%", ""), ("%", ""), (" .", " 0."), ("{.", "{0."))


def normalize_math(text: str) -> str:
    """An answer in the form in which MATH compares strings."""
    for old, new in REPLACEMENTS:
        text = text.replace(old, new)
    head, unit, tail = text.partition(r"\text{ ")
    text = head if unit and r"\text{ " not in tail else text
    for old, new in PERCENTS_AND_POINTS:
        text = text.replace(old, new)
    text = f"0{text}" if text.startswith(".") else text
    parts = text.split("=")
    text = parts[1] if len(parts) == 2 and len(parts[0]) <= 2 else text
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = _brace_fractions(text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    match = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return rf"\frac{{{int(match[1])}}}{{{int(match[2])}}}" if match and len(text) < 100 else text


def _brace_fractions(text: str) -> str:
    r"""`\frac12` as `\frac{1}{2}`, and `\frac1{72}` as `\frac{1}{72}`."""
    head, *parts = text.split(r"\frac")
    for part in parts:
        head += r"\frac"
        if part.startswith("{") or len(part) < 2:
            head += part
        elif part[1] == "{":
            head += f"{{{part[0]}}}{part[1:]}"
        else:
            head += f"{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return head
