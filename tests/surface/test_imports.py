"""No module of `src` needs itself: imports make no circle, those under `TYPE_CHECKING` and inside functions included.

A circle of imports means that no module of it can be read, tested or moved alone. Python lets one pass where an import
stands under `TYPE_CHECKING` or inside a function, but a reader has to go round it all the same.

`python tests/surface/test_imports.py` prints the circles and every import that stands inside a function.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
Graph = Mapping[str, set[str]]


def nodes(tree: ast.AST, *, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement below `tree`, and whether it stands inside a function."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from nodes(child, in_function=in_function or is_function)


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """The modules of this package that a module imports, and whether each import stands inside a function."""
    for node, in_function in nodes(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:  # `from package import module` imports the module, `from module import name` the module that has the name
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        yield from ((name, in_function) for name in names if name in MODULES)


def import_graph(*, in_functions: bool) -> Graph:
    """Which modules each module imports; imports inside functions only if `in_functions`."""
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    return {
        name: {target for target, in_function in imports(tree) if in_functions or not in_function}
        for name, tree in trees.items()
    }


def circles(graph: Graph) -> list[set[str]]:
    """The strongly connected components of more than one module, and modules that import themselves."""
    reached = {name: _reach(graph, name) for name in graph}
    components = {frozenset({name} | {other for other in reached[name] if name in reached[other]}) for name in graph}
    return [set(part) for part in components if len(part) > 1 or any(name in graph[name] for name in part)]


def _reach(graph: Graph, start: str) -> set[str]:
    """All modules that `start` needs, directly or through others."""
    reached: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting.extend(graph[name])
    return reached


def test_imports_make_no_circle() -> None:
    assert circles(import_graph(in_functions=False)) == []


def test_imports_inside_functions_make_no_circle_either() -> None:
    assert circles(import_graph(in_functions=True)) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}, "e": set()}) in (
        [{"b", "c"}, {"d"}],
        [{"d"}, {"b", "c"}],
    )


def test_an_import_counts_wherever_it_stands() -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport torch\nif TYPE_CHECKING:\n    from potstill.core import types\n"
        "def late():\n    from potstill.core.errors import UsageError\n"
    )
    assert list(imports(ast.parse(source))) == [("potstill.core.types", False), ("potstill.core.errors", True)]


if __name__ == "__main__":
    for name, path in MODULES.items():
        for target, in_function in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if in_function:
                print(f"{name} imports {target} inside a function")
    print("circles without imports inside functions:", circles(import_graph(in_functions=False)))
    print("circles with imports inside functions:", circles(import_graph(in_functions=True)))
