"""Docstrings come dedented, each once, in one order, and without tests or what was installed."""

import sys
from pathlib import Path

from potstill.data.docstrings import MIN_LENGTH, extract_docstrings, list_modules, load_docstrings


def test_every_kind_of_docstring_is_found_and_dedented() -> None:
    source = b'''"""Module."""
class A:
    """A class

        with an indented line
    and one that is not
    """
    async def f(self):
        """Method."""
        def g():
            "Inner."
X = """no docstring"""
'''
    assert set(extract_docstrings(source)) == {
        "Module.",
        "A class\n\n    with an indented line\nand one that is not",
        "Method.",
        "Inner.",
    }


def test_what_is_no_python_has_no_docstrings() -> None:
    assert list(extract_docstrings(b"print 'old'")) == []
    assert list(extract_docstrings(b"\0")) == []


def test_an_invalid_escape_in_the_library_is_no_warning_of_ours() -> None:
    assert list(extract_docstrings(b'"""Doc \\d."""')) == ["Doc \\d."]


def test_tests_and_installed_packages_are_passed_over(tmp_path: Path) -> None:
    for name in ("json/decoder.py", "test/test_json.py", "site-packages/numpy/core.py", "json/tests/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_modules(tmp_path)] == ["decoder.py"]


def test_the_library_holds_thousands_of_distinct_sorted_docstrings() -> None:
    texts = load_docstrings()
    assert len(texts) > 3000
    assert sum(len(text.encode()) for text in texts) > 1e6
    assert list(texts) == sorted(set(texts))
    assert min(map(len, texts)) >= MIN_LENGTH
    assert sys.modules["argparse"].__doc__.strip() in texts  # type: ignore[union-attr]
