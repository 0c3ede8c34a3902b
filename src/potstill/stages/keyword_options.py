"""The options of a stage as keywords of a Python function, with explicit names, types and defaults."""

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
from potstill.core.suggestions import suggest
from potstill.objectives.user_file import ObjectiveSource, name_objective
from potstill.stages.caller_objects import DataSource, ModelSource, name_objects
from potstill.stages.candidates.options import check_data_options
from potstill.train.config import DEFAULT_TOKENS
from potstill.train.run import silence_libraries

Function = TypeVar("Function", bound=Callable[..., Any])

MODELS = ("teacher", "student", "draft", "model", "models", "reference", "plus", "minus")
ONE_ANSWER = ("on_text", "draft", "draft_length", "tree", "raw")  # options of `generate` for a prompt alone
DATA_SETS = ("data", "eval_data", "source", "facts", "preferences", "questions")
TYPES: Mapping[str, Any] = {  # of options that Python gives as objects
    "teacher": ModelSource | Sequence[ModelSource] | None,
    "student": ModelSource | None,
    "draft": ModelSource | None,
    "data": DataSource | Sequence[str | Path],
    "eval_data": DataSource | None,
    **dict.fromkeys(("reference", "plus", "minus"), ModelSource | None),
    **dict.fromkeys(("teacher_cache", "reference_cache"), str | Path | None),
    "objective": ObjectiveSource,
}


def take_options(*options_classes: type, leave_out: Collection[str] = ()) -> Callable[[Function], Function]:
    """A decorator: the function gets the options of dataclasses as keywords, in place of its `**options`.

    It receives options that were given, with names for objects in memory. Its own parameters come first.
    """

    def decorate(function: Function) -> Function:
        declared = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        skipped = {*leave_out, *(p.name for p in declared)}
        all_fields = [field for options_class in options_classes for field in list_options(options_class)]
        fields: dict[str, OptionField] = {}
        for field in all_fields:  # of a name in two classes, the first
            if field.name not in skipped:
                fields.setdefault(field.name, field)
        keywords = [_make_parameter(field) for field in fields.values()]
        names = [parameter.name for parameter in (*declared, *keywords)]

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            silence_libraries()
            datasets.disable_progress_bars()
            given = dict(_read_keywords(function.__name__, options, names, fields))
            positional = _bind_positional(declared, arguments, given)
            with name_objects({**positional, **given}, models=MODELS, data=DATA_SETS) as named:
                variadic = _as_tuple(named.pop("models")) if "models" in positional else ()
                return function(*variadic, *(named.pop(name) for name in positional if name != "models"), **named)

        call.__signature__ = inspect.signature(function).replace(parameters=[*declared, *keywords])  # type: ignore[attr-defined]
        return cast(Function, call)

    return decorate


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
            hint = suggest(name, names)
            raise UsageError(f"{function_name} has no option {given_name!r}{hint}; it has {', '.join(sorted(names))}")
        if name in seen:
            raise UsageError(f"{function_name} got {name} twice, once as {given_name}; give it once")
        seen.add(name)
        if name == "objective":
            value = name_objective(value)
        elif name in fields and fields[name].option.is_count:
            value = parse_count(value)
        elif name in fields and fields[name].type == tuple[str, ...]:
            value = (value,) if isinstance(value, str | Path) else tuple(value or ())
        yield name, value


def _bind_positional(
    declared: Sequence[inspect.Parameter], arguments: Sequence[Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The positional arguments by name (all of `*models` in a list).

    Raises: UsageError for too many, or for too few with those that are `given` by name.
    """
    if declared and declared[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return {"models": list(arguments)} if declared[0].name == "models" else {}
    names = [p.name for p in declared if p.kind is not p.KEYWORD_ONLY]
    if len(arguments) > len(names):
        raise UsageError(f"give at most {len(names)} values without a name, and the others by name")
    positional = dict(zip(names, arguments, strict=False))
    missing = [p.name for p in declared if p.default is p.empty and p.name not in {*positional, *given}]
    if missing:
        raise UsageError(f"{missing[0]} is missing; give {missing[0]}=...")
    return positional


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def choose_budget(tokens: int | str | None, seconds: float | None, epochs: float | None) -> int | None:
    """The tokens of each run of an arena; None if the budget is in seconds or epochs."""
    return DEFAULT_TOKENS if tokens is None and seconds is None and epochs is None else parse_count(tokens)


def check_generation(*, prompt: Any, data: Any, out: Any, **options: Any) -> None:
    """Refuse a call that asks for no answer or for both kinds, and options of one prompt for a data set.

    Raises: UsageError.
    """
    if (prompt is None) == (data is None) or (data is None) != (out is None):
        raise UsageError("give a prompt for one answer, or data and out for the answers to a data set")
    check_data_options(options, has_data=data is not None)
    for name in ONE_ANSWER:
        if data is not None and options.get(name):
            raise UsageError(f"{name} is for the answer to one prompt; omit it with data")
