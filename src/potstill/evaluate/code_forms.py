"""Compares Python snippets by what they do: without comments, docstrings, formatting and chosen names.

Source: the normalization of code in CM-Align (arXiv:2509.08541), after its description: comments are stripped, names
are anonymized and the format is standardized. How similar two forms are is the definition here: 1 - d / length, with
the edit distance d of their tokens and the length of the longer one.
"""

import ast
import io
import re
import tokenize
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
LAYOUT_TOKENS = (tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER, tokenize.ENCODING, tokenize.COMMENT)


@lru_cache(maxsize=4096)
def read_code(text: str) -> str | None:
    """The form of a text's snippet; None without one that Python reads.

    The snippet is the longest block between ``` fences, or else the whole text.
    """
    snippet = max(FENCE.findall(text), key=len, default=text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of invalid escapes in a model's code
            tree = ast.parse(snippet)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    form = ast.unparse(_Anonymizer(tree).visit(_DocstringRemover().visit(tree)))
    return form if form.strip() else None


def compare_code(texts: Sequence[str]) -> Float[Tensor, "N N"]:
    """The similarity of the forms of all pairs of texts, in float64; 0 where one is no code."""
    tokens = [() if form is None else tokenize_form(form) for form in map(read_code, texts)]
    rows = [[_compare_tokens(*sorted((a, b))) for b in tokens] for a in tokens]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(texts), len(texts))


def tokenize_form(form: str) -> tuple[str, ...]:
    """The tokens of a form."""
    tokens = tokenize.generate_tokens(io.StringIO(form).readline)
    return tuple(token.string for token in tokens if token.type not in LAYOUT_TOKENS)


@lru_cache(maxsize=4096)
def _compare_tokens(first: tuple[str, ...], second: tuple[str, ...]) -> float:
    if not first or not second:
        return 0.0
    return 1 - count_edits(first, second) / max(len(first), len(second))


def count_edits(first: Sequence[str], second: Sequence[str]) -> int:
    """The least number of tokens inserted, deleted or replaced that makes `second` of `first`.

    One bit per token of `first` holds how the distance changes along a column, so a step needs a few operations on
    integers. `ops.edit_distance` is the plain definition, which a test compares.

    Source: Hyyrö, "A Bit-Vector Algorithm for Computing Levenshtein and Damerau Edit Distances" (Nordic Journal of
    Computing, 2003), after Myers (doi:10.1145/316542.316550).
    """
    matches: dict[str, int] = {}
    for position, token in enumerate(first):
        matches[token] = matches.get(token, 0) | 1 << position
    every, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    rises, falls, distance = every, 0, len(first)
    for token in second:
        match = matches.get(token, 0)
        diagonal = (((match & rises) + rises) ^ rises) | match | falls
        row_rises, row_falls = falls | ~(diagonal | rises), diagonal & rises
        distance += bool(row_rises & last) - bool(row_falls & last)
        row_rises, row_falls = row_rises << 1 | 1, row_falls << 1
        rises, falls = (row_falls | ~(diagonal | row_rises)) & every, row_rises & diagonal & every
    return distance


class _DocstringRemover(ast.NodeTransformer):
    """Removes expressions that are only a string, such as docstrings."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_string else self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        node = super().generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.body:
            node.body = [ast.Pass()]
        return node


class _Anonymizer(ast.NodeTransformer):
    """Renames what a snippet itself names (functions, classes, arguments, variables) to `v0`, `v1`, ... in order."""

    def __init__(self, tree: ast.AST) -> None:
        self.names: dict[str, str] = {}
        self.bound = {name for node in ast.walk(tree) for name in _list_bound_names(node)}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for field in ("id", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str) and name in self.bound and not _is_import_name(node, field):
                setattr(node, field, self.names.setdefault(name, f"v{len(self.names)}"))
        return super().generic_visit(node)


def _is_import_name(node: ast.AST, field: str) -> bool:
    return isinstance(node, ast.alias) and field == "name"


def _list_bound_names(node: Any) -> list[str]:
    """The names that a node of a syntax tree gives to something."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.alias(asname=str(name)):
            return [name]
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            return [name]
    return []
