"""The corpus `stdlib`: docstrings of Python's standard library, technical English that every machine has.

Its content depends on the Python version alone, which the provenance of the corpus names. The docstrings are under
Python's license (PSF-2.0).
"""

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from potstill.core.errors import DataError

MIN_LENGTH = 80  # characters; shorter ones are such as "Return the name."
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
LICENSE = "PSF-2.0"


@functools.cache
def load_docstrings() -> tuple[str, ...]:
    """All docstrings of at least `MIN_LENGTH` characters: dedented, without duplicates, sorted.

    Raises: DataError if this Python has no source files of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = {
        text for path in list_modules(root) for text in extract_docstrings(path.read_bytes()) if len(text) >= MIN_LENGTH
    }
    if not texts:
        raise DataError(f"{root} holds no Python source, so there is no corpus `stdlib`; give a file instead")
    return tuple(sorted(texts))


def list_modules(root: Path) -> Iterator[Path]:
    """The source files of the library below `root`, without tests and installed packages."""
    return (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))


def extract_docstrings(source: bytes) -> Iterator[str]:
    """The dedented docstrings of a module, its classes and functions; none if the source is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library has invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
