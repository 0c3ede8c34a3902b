"""Corpora of docstrings, technical English that needs no download: `docstrings` and `stdlib`.

`docstrings` reads packages that potstill depends on. Their wheels hold the same files for every system and Python, so
one set of versions gives one text on every machine. `stdlib` reads Python's own library, which differs between the
versions of Python.
"""

import ast
import functools
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePath
from typing import NamedTuple

from potstill.core.errors import DataError, MissingDependency
from potstill.core.notes import print_note

MIN_LENGTH = 80  # characters; shorter ones are such as "Return the name."
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
LIBRARY_LICENSE = "PSF-2.0"

PACKAGE_VERSIONS = {  # those of constraints.txt
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "huggingface_hub": "2.4.0",
    "networkx": "3.6.1",
    "peft": "0.21.2",
}
PACKAGE_LICENSE = "Apache-2.0 AND BSD-3-Clause"  # networkx is under BSD-3-Clause, the others are under Apache-2.0
PACKAGE_DIGEST = "9a0081e3d62f901edd5679560de5bf013efe855ec9f9df5782d7e3978d5310c2"


class Docstrings(NamedTuple):
    """Docstrings in their order, their license, and the versions that they come from."""

    texts: tuple[str, ...]
    license: str
    versions: Mapping[str, str]


@functools.cache
def load_library() -> Docstrings:
    """The docstrings of Python's library.

    Raises: DataError if this Python has no source files of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = collect_docstrings(list_modules(root))
    if not texts:
        raise DataError(f"{root} holds no Python source, so there is no corpus `stdlib`; give a file instead")
    return Docstrings(texts, LIBRARY_LICENSE, {"python": platform.python_version()})


@functools.cache
def load_packages() -> Docstrings:
    """The docstrings of `PACKAGE_VERSIONS`, with a note if their SHA-256 is not `PACKAGE_DIGEST`.

    Raises: MissingDependency for a package that is not installed; DataError for one without source files.
    """
    paths, versions = [], {}
    for name in PACKAGE_VERSIONS:
        versions[name], modules = find_package(name)
        paths += modules
    texts = collect_docstrings(paths)
    if compute_digest(texts) != PACKAGE_DIGEST:
        print_note(describe_difference(versions))
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Docstrings(texts, PACKAGE_LICENSE, {"packages": packages})


def list_modules(root: Path) -> Iterator[Path]:
    """The source files of the library below `root`, without tests and installed packages."""
    return (path for path in root.rglob("*.py") if is_module(path.relative_to(root)))


def find_package(name: str) -> tuple[str, list[Path]]:
    """The version of an installed package, and its source files without tests.

    Raises: MissingDependency, DataError.
    """
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise MissingDependency(f"the data `docstrings` needs {name}; run: pip install {name}") from None
    paths = [Path(str(file.locate())) for file in package.files or () if file.suffix == ".py" and is_module(file)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"the package {name} has no Python source here; install it with pip, or give other --data")
    return package.version, paths


def describe_difference(versions: dict[str, str]) -> str:
    """A sentence on how `versions` differ from `PACKAGE_VERSIONS`."""
    differences = [
        f"{name} is {versions[name]} and not {pinned}"
        for name, pinned in PACKAGE_VERSIONS.items()
        if versions[name] != pinned
    ]
    cause = ", ".join(differences) or "the files of a package were changed"
    return f"figures differ from those in potstill's documentation, since {cause} (the text of `docstrings`)"


def is_module(path: PurePath) -> bool:
    """Whether a path relative to a library is a module of it, and not a test or an installed package."""
    return not SKIPPED_FOLDERS & set(path.parts)


def collect_docstrings(paths: Iterable[Path]) -> tuple[str, ...]:
    """All docstrings of at least `MIN_LENGTH` characters in source files: dedented, without duplicates, sorted."""
    texts = {text for path in paths for text in extract_docstrings(path.read_bytes()) if len(text) >= MIN_LENGTH}
    return tuple(sorted(texts))


def compute_digest(texts: Sequence[str]) -> str:
    """The SHA-256 of texts, with a zero byte between them."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def extract_docstrings(source: bytes) -> Iterator[str]:
    """The dedented docstrings of a module, its classes and functions; none if the source is not valid Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries have invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


CORPORA: Mapping[str, Callable[[], Docstrings]] = {"docstrings": load_packages, "stdlib": load_library}
