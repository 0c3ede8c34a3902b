"""Nothing in `src` is too large to read at once: no function over 45 lines, no file over 350, few imported names.

A function's length is that of its signature and body, from `def` to its last line, without docstring and decorators, so
that an explanation does not make a function count as longer. A file's length is that of all its lines.

`python tests/surface/test_size.py` prints the largest.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "potstill"
FUNCTION_LINES, FILE_LINES, IMPORTED_NAMES = 45, 350, 40

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> Iterator[tuple[str, str]]:
    """Every file of the package: its path inside the package, and its text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def function_lengths(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function and method, without decorators and docstring."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            ignored = docstring.end_lineno - docstring.lineno + 1 if docstring and docstring.end_lineno else 0
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1 - ignored


def imported_names(tree: ast.Module) -> set[str]:
    """The names that a module takes from other modules of this package, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "potstill":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "potstill"}
    return names


def all_function_lengths() -> dict[str, int]:
    """Lines by `path name`; of functions that share a name in one file, the longest."""
    lengths: dict[str, int] = {}
    for path, source in sources():
        for name, lines in function_lengths(ast.parse(source)):
            lengths[f"{path} {name}"] = max(lines, lengths.get(f"{path} {name}", 0))
    return lengths


def all_file_lengths() -> dict[str, int]:
    """Lines by path."""
    return {path: len(source.splitlines()) for path, source in sources()}


def all_import_counts() -> dict[str, int]:
    """Number of imported project names by path."""
    return {path: len(imported_names(ast.parse(source))) for path, source in sources()}


def over(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """What is larger than `limit`, with its size."""
    return {name: size for name, size in sizes.items() if size > limit}


def test_no_function_is_too_long() -> None:
    assert over(all_function_lengths(), FUNCTION_LINES) == {}


def test_no_file_is_too_long() -> None:
    assert over(all_file_lengths(), FILE_LINES) == {}


def test_no_file_imports_too_many_names() -> None:
    assert over(all_import_counts(), IMPORTED_NAMES) == {}


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f():\n    return 1\n", 2),
        ("@cache\ndef f():\n    '''Says\n    much.'''\n    return 1\n", 2),
        ("class C:\n    async def f(\n        self,\n    ):\n        pass\n\n\nx = 1\n", 4),
    ],
)
def test_a_function_is_measured_without_docstring_and_decorators(source: str, lines: int) -> None:
    assert list(function_lengths(ast.parse(source))) == [("f", lines)]


def test_names_of_this_project_alone_are_counted() -> None:
    source = "from torch import nn\ndef f():\n    from potstill.core.types import Batch, Needs\nimport potstill.ops\n"
    names = imported_names(ast.parse(source))
    assert names == {"potstill.core.types.Batch", "potstill.core.types.Needs", "potstill.ops"}


if __name__ == "__main__":
    measured = [("lines of a function", all_function_lengths(), FUNCTION_LINES)]
    measured += [("lines of a file", all_file_lengths(), FILE_LINES)]
    measured += [("imported project names", all_import_counts(), IMPORTED_NAMES)]
    for title, sizes, limit in measured:
        print(f"{title}: at most {max(sizes.values())}; over {limit}:", *over(sizes, limit).items(), sep="\n  ")
