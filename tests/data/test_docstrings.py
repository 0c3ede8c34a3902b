"""Docstrings come dedented, each once, in one order, and without tests or what was installed."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from potstill.core.errors import DataError, MissingDependency
from potstill.data import docstrings
from potstill.data.docstrings import MIN_LENGTH, extract_docstrings, list_modules, load_library

ROOT = Path(__file__).parents[2]


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
    texts = load_library().texts
    assert len(texts) > 3000
    assert sum(len(text.encode()) for text in texts) > 1e6
    assert list(texts) == sorted(set(texts))
    assert min(map(len, texts)) >= MIN_LENGTH
    assert sys.modules["argparse"].__doc__.strip() in texts  # type: ignore[union-attr]


def test_the_text_of_the_packages_is_that_of_the_pinned_versions(capsys: pytest.CaptureFixture[str]) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pins[name] for name in docstrings.PACKAGE_VERSIONS} == docstrings.PACKAGE_VERSIONS
    docstrings.load_packages.cache_clear()
    texts = docstrings.load_packages().texts
    assert docstrings.compute_digest(texts) == docstrings.PACKAGE_DIGEST
    assert capsys.readouterr().err == ""
    assert sum(map(len, texts)) > 3e6


def test_the_packages_have_one_wheel_for_all_systems() -> None:
    for name in docstrings.PACKAGE_VERSIONS:
        assert "Tag: py3-none-any" in (metadata.distribution(name).read_text("WHEEL") or ""), name


def test_another_version_of_a_package_is_one_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docstrings, "PACKAGE_VERSIONS", {"accelerate": "0.1"})
    corpus = docstrings.load_packages.__wrapped__()
    version = metadata.version("accelerate")
    assert corpus.versions == {"packages": f"accelerate {version}"}
    assert len(corpus.texts) > 300
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"since accelerate is {version} and not 0.1" in error
    assert "were changed" in docstrings.describe_difference({"accelerate": "0.1"})


def test_a_package_that_is_missing_or_has_no_source_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(MissingDependency, match="needs nothing-here; run: pip install nothing-here"):
        docstrings.find_package("nothing-here")
    (tmp_path / "bare-1.dist-info").mkdir()
    (tmp_path / "bare-1.dist-info" / "METADATA").write_text("Name: bare\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="bare has no Python source"):
        docstrings.find_package("bare")
