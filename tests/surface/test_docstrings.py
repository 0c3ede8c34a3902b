"""What is public says what it is, and an op says where its mathematics comes from."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import potstill

PACKAGE = Path(__file__).parents[2] / "src" / "potstill"
FLOORS = ("ops", "objectives", "transforms", "evaluate")
FILES = [path for floor in FLOORS for path in sorted((PACKAGE / floor).rglob("*.py"))]
OPS = [path for path in sorted((PACKAGE / "ops").rglob("*.py")) if path.name != "__init__.py"]
SOURCE = re.compile(
    r"arXiv:\d{4}\.\d{4,5}|doi:10\.|https?://|\bdefinition\b|\([A-Z][\w-]+(?: et al\.| and [A-Z][\w-]+)?,? \d{4}\)",
    re.IGNORECASE,
)

FLOOR_NAMES = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} | {"pipeline"}

SAID_BY_THE_PROTOCOL = {"additive", "counts", "forward", "needs", "weights"}

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public(tree: ast.Module | ast.ClassDef) -> Iterator[Documented]:
    """The functions and classes of a module, and the methods of its classes, whose names do not begin with `_`.

    What the protocols of `core.types` and `nn.Module` already say of a method (`counts`, `forward`) is not said again,
    and a protocol says in its own docstring what the methods are that it declares with `...`.
    """
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (method for method in public(node) if not said_elsewhere(method))


def said_elsewhere(method: Documented) -> bool:
    declared = len(method.body) == 1 and ast.unparse(method.body[0]) == "..."
    return declared or method.name in SAID_BY_THE_PROTOCOL


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_public_name_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name(path)} opens without saying what it is"
    silent = [f"{node.name} (line {node.lineno})" for node in public(tree) if not ast.get_docstring(node)]
    assert not silent


@pytest.mark.parametrize("path", OPS, ids=name)
def test_every_op_names_its_source(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = [ast.get_docstring(node) or "" for node in (tree, *public(tree))]
    assert any(SOURCE.search(text) for text in docstrings), "no arXiv number, doi, paper or definition is named"


def test_a_missing_docstring_is_noticed() -> None:
    tree = ast.parse("class Loud:\n    '''Says.'''\n    def shout(self): pass\ndef _hidden(): pass\ndef mute(): pass\n")
    assert [node.name for node in public(tree) if not ast.get_docstring(node)] == ["shout", "mute"]


@pytest.mark.parametrize(
    ("text", "sourced"),
    [
        ("Minimises KL (arXiv:2306.13649, eq. 3).", True),
        ("The definition, in plain torch.", True),
        ("As in (Hinton et al., 2015).", True),
        ("A very good loss (2 flavours).", False),
    ],
)
def test_a_source_is_told_from_prose(text: str, sourced: bool) -> None:
    assert bool(SOURCE.search(text)) == sourced


MODULE_NAME = re.compile(rf"`((?:potstill\.)?(?:{'|'.join(sorted(FLOOR_NAMES))})(?:\.\w+)+)(?:\(\))?`")


def stale_names(text: str) -> list[str]:
    """The dotted names in backticks that begin with a package of potstill and lead to nothing in it."""
    names = [name for name in MODULE_NAME.findall(text) if not name.endswith((".json", ".jsonl"))]
    return [name for name in names if not leads_somewhere(name.removeprefix("potstill."))]


def leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a module or package, or a name that the last module along it binds."""
    place, parts = PACKAGE, name.split(".")
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if parts and (place / f"{parts[0]}.py").is_file():
        place /= f"{parts.pop(0)}.py"
    known = bound_names(place) if place.is_file() else set()
    return all(part in known for part in parts)


@functools.cache
def bound_names(path: Path) -> set[str]:
    """Everything that a file defines, assigns, takes as an argument or imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=bound) | ast.ClassDef(name=bound) | ast.arg(arg=bound):
                names.add(bound)
            case ast.Name(id=bound, ctx=ast.Store()) | ast.Attribute(attr=bound):
                names.add(bound)
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name)
def test_every_module_that_is_named_exists(path: Path) -> None:
    assert not stale_names(path.read_text(encoding="utf-8"))


def test_a_stale_name_is_noticed() -> None:
    text = "`ops.align.match_spans` exists; `ops.align.exact`, `pipeline.text` and `potstill.data.pack` do not"
    assert stale_names(text) == ["ops.align.exact", "pipeline.text", "potstill.data.pack"]


def test_the_reference_has_every_public_name_of_python() -> None:
    reference = (PACKAGE.parents[1] / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    names = set(re.findall(r"^## (\w+)$", reference, re.MULTILINE))
    for module in re.findall(r"^::: potstill\.([a-z_.]+)$", reference, re.MULTILINE):
        tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        names |= {node.name for node in tree.body if isinstance(node, Documented)}
    assert not set(potstill.__all__) - names
