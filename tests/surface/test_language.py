"""The names in `src` read as the field's own English: functions are verb phrases or nouns, and no local name is empty.

A name should say what a thing is or does. Two habits hide that: functions named by a participle, an adverb or a
preposition, and local names such as `found` or `one` that fit any value. In other codebases of this field 1 to 6 % of
the functions have the first; this test allows less than 5 %.

What transformers names is not counted: the events of `TrainerCallback`, such as `on_log`.

`python tests/surface/test_language.py` prints the share and every name that counts toward it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "potstill"
LARGEST_SHARE = 0.05


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Prepositions, adverbs, conjunctions, pronouns and articles. `to_dict` and `from_folder` count as well, though they are
# common in this field.
FUNCTION_WORDS = words(
    """
    about above across after against ahead all almost alone along already also always among an and anew another any
    apart around as aside at away back because before behind below beneath beside besides between beyond both but by
    despite down during each either else enough even ever every except few first for forth from further hence here
    how if in inside instead into it its just last later least less many more most much near never next no none nor
    not now of off often on once only onto or otherwise ours out outside over own past per quite rather same several
    since so some soon still such than that the theirs then there these they this those though through throughout
    thus to together too toward towards twice under unless until up upon very via well what when whence where
    whether which while who whole whose why with within without yet
    """
)
IRREGULAR_PARTICIPLES = words(
    """
    begun bent born bought bound brought built chosen done drawn driven fed felt found frozen given gone got gotten
    grown heard held hidden kept known laid led left lent lost made meant met paid proven said seen sent shown sold
    spent spoken stood sworn taken taught thought thrown told understood unfrozen won worn written
    """
)
# Words of these kinds that are nouns, verbs, or part of a term of the field (MinED is a method).
NO_PARTICIPLES = words(
    """
    bring building ceiling embed embedding encoding exceed feed hidden_size hidden_states indeed logging mapping
    mined need next_token packed_attention padding proceed ring scoring seed setting shed speed spelling spring
    staging string thing timing training warning
    """
)
EVENTS = words(
    """
    on_epoch_begin on_epoch_end on_evaluate on_init_end on_log on_optimizer_step on_pre_optimizer_step on_predict
    on_prediction_step on_save on_step_begin on_step_end on_substep_end on_train_begin on_train_end
    """
)
EMPTY = words("asked found kept known made one ours own said theirs told")
# Published field names: cards, JSON output, the command line and Python callers read them.
PUBLISHED_FIELDS = frozenset(
    {("stages/checks/report.py", "found"), ("teachers/cached.py", "kept"), ("stages/options.py", "own")}
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package: its path inside the package, and its tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def is_counted(name: str) -> bool:
    """Whether the first word of a function's name is a participle, an adverb, a preposition or a pronoun."""
    name = name.strip("_")
    first = name.split("_")[0]
    if first in NO_PARTICIPLES or any(name.startswith(term) for term in NO_PARTICIPLES if "_" in term):
        return False
    is_participle = first in IRREGULAR_PARTICIPLES or bool(re.fullmatch(r"[a-z]{2,}(ed|ing)", first))
    return is_participle or first in FUNCTION_WORDS


def function_names() -> list[tuple[str, int, str]]:
    """Path, line and name of every function and method but Python's `__dunder__` names and transformers' events."""
    return [
        (path, node.lineno, node.name)
        for path, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, Function) and not re.fullmatch(r"__\w+__", node.name) and node.name not in EVENTS
    ]


def counted_functions() -> tuple[list[str], float]:
    """The functions whose names count, and their share of all functions."""
    names = function_names()
    counted = [f"{path}:{line} {name}" for path, line, name in names if is_counted(name)]
    return counted, len(counted) / len(names)


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that a module binds: variables, arguments, attributes, functions, classes, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from ((node.lineno, alias.asname) for alias in aliases if alias.asname)


def test_few_functions_are_named_by_a_participle_an_adverb_or_a_preposition() -> None:
    counted, share = counted_functions()
    assert share < LARGEST_SHARE, f"{share:.1%} of the functions:\n" + "\n".join(counted)


def test_no_name_is_empty() -> None:
    offenders = [
        f"{path}:{line} {name}"
        for path, tree in modules()
        for line, name in bound_names(tree)
        if name in EMPTY and (path, name) not in PUBLISHED_FIELDS
    ]
    assert not offenders


def test_every_published_field_that_is_exempt_exists() -> None:
    bound = {(path, name) for path, tree in modules() for _, name in bound_names(tree)}
    assert bound >= PUBLISHED_FIELDS


@pytest.mark.parametrize("name", ["asked", "_recalled", "told_apart", "leaving", "beside_teacher", "frozen"])
def test_a_participle_an_adverb_or_a_preposition_is_counted(name: str) -> None:
    assert is_counted(name)


@pytest.mark.parametrize(
    "name",
    [
        "embedding",
        "padding_mask",
        "feed_forward",
        "packed_attention_mask",
        "hidden_size",
        "load_model",
        "rows",
        "string",
    ],
)
def test_a_noun_or_a_verb_is_not_counted(name: str) -> None:
    assert not is_counted(name)


def test_every_way_to_bind_a_name_is_seen() -> None:
    source = (
        "for found in x:\n  one = 1\ndef f(said, *told): pass\nself.kept = 1\nimport x as known\n"
        "try: pass\nexcept E as made: pass\n[asked for asked in x]\n(ours := 1)\n"
        "with x as own: pass\nmatch x:\n  case theirs: pass\n"
    )
    assert {name for _, name in bound_names(ast.parse(source))} >= EMPTY


if __name__ == "__main__":
    counted, share = counted_functions()
    print(*counted, f"{share:.2%} of {len(function_names())} functions ({len(counted)})", sep="\n")
