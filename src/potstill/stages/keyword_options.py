"""The options of a stage as keywords of a Python function, with explicit names, types and defaults."""

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets

from potstill.core.counts import parse_count
from potstill.core.errors import UsageError
from potstill.core.hf_names import translate_name
from potstill.core.options import OptionField, list_options
from potstill.objectives.user_file import ObjectiveSource, name_objective
from potstill.stages.caller_objects import DataSource, ModelSource, name_objects
from potstill.train.run import silence_libraries

Function = TypeVar("Function", bound=Callable[..., Any])

MODELS = ("teacher", "student", "model", "models")
DATA_SETS = ("data", "eval_data", "source")
DEFAULT_BUDGET = 200_000  # tokens of each run of an arena
TYPES: Mapping[str, Any] = {  # of options that Python gives as objects
    "teacher": ModelSource | Sequence[ModelSource] | None,
    "student": ModelSource | None,
    "data": DataSource | Sequence[str | Path],
    "eval_data": DataSource | None,
    "teacher_cache": str | Path | None,
    "objective": ObjectiveSource,
}


def take_options(options_class: type | None, *, leave_out: Collection[str] = ()) -> Callable[[Function], Function]:
    """A decorator: the function gets the options of a dataclass as keywords, in place of its `**options`.

    It receives options that were given, with names for objects in memory. Its own parameters come first.
    """

    def decorate(function: Function) -> Function:
        declared = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        skipped = {*leave_out, *(p.name for p in declared)}
        fields = {field.name: field for field in _list_fields(options_class) if field.name not in skipped}
        keywords = [_make_parameter(field) for field in fields.values()]
        names = [parameter.name for parameter in (*declared, *keywords)]

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            silence_libraries()
            datasets.disable_progress_bars()
            given = dict(_read_keywords(function.__name__, options, names, fields))
            positional, given = _bind_positional(declared, arguments, given)
            with name_objects({**positional, **given}, models=MODELS, data=DATA_SETS) as named:
                variadic = _as_tuple(named.pop("models")) if "models" in positional else ()
                return function(*variadic, *(named.pop(name) for name in positional if name != "models"), **named)

        call.__signature__ = inspect.signature(function).replace(parameters=[*declared, *keywords])  # type: ignore[attr-defined]
        return cast(Function, call)

    return decorate


def _list_fields(options_class: type | None) -> tuple[OptionField, ...]:
    return () if options_class is None else list_options(options_class)


def _make_parameter(field: OptionField) -> inspect.Parameter:
    """An option as a keyword with the type that Python takes."""
    field_type = TYPES.get(field.name, field.type)
    if field.option.is_count:
        field_type = int | str | None if field.option.default is None else int | str
    elif field_type == tuple[str, ...]:
        field_type = Sequence[str]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=field.option.default, annotation=field_type
    )


def _read_keywords(
    function_name: str, options: Mapping[str, Any], names: Sequence[str], fields: Mapping[str, OptionField]
) -> Iterator[tuple[str, Any]]:
    """The given options by our names, with counts as numbers.

    Raises: UsageError for an unknown option, or one that is given under two names.
    """
    seen: set[str] = set()
    for given_name, value in options.items():
        name = translate_name(given_name, names)
        if name not in names:
            guess = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {guess[0]}? " if guess else ""
            raise UsageError(f"{function_name} has no option {given_name!r}; {hint}it has {', '.join(sorted(names))}")
        if name in seen:
            raise UsageError(f"{function_name} got {name} twice, once as {given_name}; give it once")
        seen.add(name)
        if name == "objective":
            value = name_objective(value)
        elif name in fields and fields[name].option.is_count:
            value = parse_count(value)
        elif name in fields and fields[name].type == tuple[str, ...]:
            value = tuple(value or ())
        yield name, value


def _bind_positional(
    declared: Sequence[inspect.Parameter], arguments: Sequence[Any], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The positional arguments by name (all of `*models` in a list), and the other options.

    Raises: UsageError for too many or too few.
    """
    if declared and declared[0].kind is inspect.Parameter.VAR_POSITIONAL:
        if declared[0].name == "models":
            return {"models": list(arguments)}, given
        return {}, given
    names = [p.name for p in declared if p.kind is not p.KEYWORD_ONLY]
    if len(arguments) > len(names):
        raise UsageError(f"give at most {len(names)} values without a name, and the others by name")
    positional = dict(zip(names, arguments, strict=False))
    missing = [p.name for p in declared if p.default is p.empty and p.name not in {*positional, *given}]
    if missing:
        raise UsageError(f"{missing[0]} is missing; give {missing[0]}=...")
    return positional, given


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def get_defaults(options_class: type) -> dict[str, Any]:
    """The default of each option by its name."""
    return {field.name: field.option.default for field in list_options(options_class)}


def choose_budget(tokens: int | str | None, seconds: float | None) -> int | None:
    """The tokens of each run of an arena; None if the budget is in seconds."""
    return DEFAULT_BUDGET if tokens is None and seconds is None else parse_count(tokens)


def check_generation(*, prompt: Any, data: Any, out: Any) -> None:
    """Refuse a call that asks for no answer, or for both kinds. Raises: UsageError."""
    if (prompt is None) == (data is None) or (data is None) != (out is None):
        raise UsageError("give a prompt for one answer, or data and out for the answers to a data set")
