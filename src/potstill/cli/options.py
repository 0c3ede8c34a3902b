"""The options that several commands share; functions that read options from dataclasses and YAML files."""

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_type_hints

import typer

from potstill.cli.config_file import flatten_options, read_yaml
from potstill.core.counts import format_count, parse_count
from potstill.core.errors import ArtifactError, NotFound, UsageError
from potstill.core.hf_names import translate_name
from potstill.core.options import (
    ALLOW_PICKLE,
    CONTEXT,
    DEVICE,
    DTYPE,
    IGNORE_GENERATION_CONFIG,
    SEED,
    TRUST_REMOTE_CODE,
    OptionField,
    list_options,
)
from potstill.core.suggestions import suggest
from potstill.stages.options import COLUMNS, LOCAL_TEACHER_HELP

if TYPE_CHECKING:
    CommandContext = typer.Context
else:
    CommandContext = typer.Context.__mro__[1]  # typer passes the base class, and wants it named

DRY_RUN_HELP = "Check the options and print what they make; save them to OUT.yaml for --config, and stop."

BRACKET = re.compile(r"\[(?=[a-z])")  # in a help text, where rich reads it as markup

Command = TypeVar("Command", bound=Callable[..., Any])

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and everything else to stderr.")]
Teacher = Annotated[  # a list, so that a second teacher is refused and does not replace the first one
    list[str] | None, typer.Option("--teacher", help=LOCAL_TEACHER_HELP, metavar="TEXT")
]
Out = Annotated[str, typer.Option(help="The folder to write; it must not exist, or be empty.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub id, a folder, a .gguf file or smollm2; MODEL#0.5: one size of an elastic model."
    ),
]
Context = Annotated[int, typer.Option(help=CONTEXT.help)]
Columns = Annotated[str, typer.Option(help=COLUMNS.help)]
Device = Annotated[str, typer.Option(help=DEVICE.help)]
Dtype = Annotated[str, typer.Option(help=DTYPE.help)]
Seed = Annotated[int, typer.Option(help=SEED.help)]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help=ALLOW_PICKLE.help)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help=TRUST_REMOTE_CODE.help)]
IgnoreGenerationConfig = Annotated[bool, typer.Option("--ignore-generation-config", help=IGNORE_GENERATION_CONFIG.help)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")]
Config = Annotated[
    str | None,
    typer.Option(
        help="A YAML file of these options, or the card.json of a run; options of the command line override it."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)]

SCREEN_OPTIONS = {  # of every command; `app.main` reads them
    "verbose": "Also show the messages of the libraries, and the seconds of each phase.",
    "quiet": "Show only warnings and errors on stderr.",
    "debug": "Show the traceback of an error.",
}
ALTERNATIVES = (  # one of each group; that of the command line replaces that of the file
    ("student", "keep", "params"),
    ("tokens", "epochs"),
)
CALL_OPTIONS = ("out", "config", "overwrite", "resume", "dry_run", "as_json")  # of the call, not of the run

CONFIG_COMMANDS = (
    "prune",
    "convert",
    "edit",
    "measure",
    "generate",
    "arena",
    "doctor",
    "advise",
    "export",
    "run",
    "write_cache",
)
TEXT_LISTS = ("objectives", "seeds", "draft_length")  # lists in a file that the command line writes with commas
COUNT_OPTIONS = ("tokens", "params", "draft_vocabulary")  # written as 200k or 60M


def take_options(
    options_class: type, *, leave_out: Collection[str] = (), help_texts: Mapping[str, str] | None = None
) -> Callable[[Command], Command]:
    """A decorator that gives a command the options of a dataclass, which it receives as `**options`.

    The command's own parameters come first, and those of the call (`--overwrite`, `--json`, ...) last. The decorator
    adds no option that the command itself declares. `help_texts` replaces help texts by option name.
    """

    def decorate(function: Command) -> Command:
        signature = inspect.signature(function)
        parameters = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        added = {
            field.name: _make_parameter(field, (help_texts or {}).get(field.name, field.option.help))
            for field in list_options(options_class)
            if field.option.on_command_line and field.name not in (*leave_out, *parameters)
        }
        last = {name: p for name, p in parameters.items() if name in CALL_OPTIONS and p.default is not p.empty}
        ordered = {**{name: p for name, p in parameters.items() if name not in last}, **added, **last}
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered.values()]
        function.__signature__ = signature.replace(parameters=keywords)  # type: ignore[attr-defined]
        function.__annotations__ = {
            **{name: p.annotation for name, p in ordered.items()},
            "return": signature.return_annotation,
        }
        return function

    return decorate


def add_config_option(function: Command) -> Command:
    """Declare --config on a command that has a config, and does not read it itself."""
    if "config" in inspect.signature(function).parameters or function.__name__ not in CONFIG_COMMANDS:
        return function
    help_text = "A YAML file of these options, also `out`; options of the command line override it."
    return _declare(function, {"config": Annotated[str | None, typer.Option(help=help_text, expose_value=False)]}, None)


def add_screen_options(function: Command) -> Command:
    """Declare --verbose, --quiet and --debug on a command, which does not receive them."""
    panel = "What stderr shows"
    options = {
        name: Annotated[bool, typer.Option(f"--{name}", help=text, expose_value=False, rich_help_panel=panel)]
        for name, text in SCREEN_OPTIONS.items()
    }
    return _declare(function, options, default=False)


def _declare(function: Command, annotations: Mapping[str, Any], default: Any) -> Command:
    """`function` with further options at its end, which it does not receive."""

    @functools.wraps(function)
    def command(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **{name: value for name, value in options.items() if name not in annotations})

    signature = inspect.signature(function)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation in annotations.items()
    ]
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    command.__annotations__ = {**function.__annotations__, **annotations}
    return cast(Command, command)


def _make_parameter(field: OptionField, help_text: str) -> inspect.Parameter:
    """An option as a parameter that typer understands."""
    default, field_type = field.option.default, field.type
    flags = [f"--{field.name.replace('_', '-')}"] if field_type is bool and not default else []
    metavar = None
    if field.option.is_count:
        field_type, default = (str if default is not None else str | None), format_count(default)
    elif tuple[str, ...] in (field_type, *get_args(field_type)):
        field_type, default, metavar = list[str] | None, None, "TEXT"
    typer_option = typer.Option(*flags, help=BRACKET.sub(r"\[", help_text), metavar=metavar)
    annotation = Annotated[field_type, typer_option]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def read_options(options_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the fields of a dataclass, without those of nested dataclasses, from a command line's options.

    Raises: UsageError if a count is invalid.
    """
    own_fields = {field.name for field in dataclasses.fields(options_class)}
    values: dict[str, Any] = {}
    for name, field_name, field_type, option in list_options(options_class):
        if name not in options or field_name not in own_fields:
            continue
        value = options[name]
        if field_type == tuple[str, ...]:
            value = tuple(value or option.default)
        elif isinstance(value, list | tuple):  # one value, or several
            value = tuple(value) if len(value) > 1 else next(iter(value), option.default)
        values[field_name] = option.default if value is None else value
        if option.is_count:
            values[field_name] = parse_count(options[name])
    return values


def get_teachers(teachers: Sequence[str] | None) -> str | tuple[str, ...]:
    """The teacher, or all of several.

    Raises: UsageError without one.
    """
    return get_single_teacher(teachers) if not teachers or len(teachers) == 1 else tuple(teachers)


def get_single_teacher(teachers: Sequence[str] | None) -> str:
    """The name of the only teacher.

    Raises: UsageError if there is none, or several.
    """
    if not teachers:
        raise UsageError("no teacher is given; give --teacher, such as smollm2")
    if len(teachers) > 1:
        raise UsageError(f"this command takes one teacher, and you gave {len(teachers)}; give one of them")
    return teachers[0]


def expand_path(text: str) -> Path:
    """A path with the home folder expanded."""
    return Path(text).expanduser()


def check_output_file(out: str | None) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises: NotFound, UsageError, ArtifactError.
    """
    if out is None:
        return
    file = expand_path(out).absolute()
    if not file.parent.is_dir():
        raise NotFound(f"there is no folder {file.parent} to write {file.name} in; create it first")
    if file.is_dir():
        raise UsageError(f"{out} is a folder; give the name of a file")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"no permission to write in {file.parent}; choose another --out")


def get_number_types(stage: type) -> dict[str, type]:
    """The fields of a dataclass that are numbers, with their type."""
    return {field.name: field.type for field in dataclasses.fields(stage) if field.type in (int, float)}


def merge_options(ctx: CommandContext, config: str | None, extra_types: Mapping[str, type]) -> dict[str, Any]:
    """The options of a command: those of its YAML file (or of the stage in a card), overridden by the command line.

    A file may also set `extra_types`, for which the command line has no option.

    Raises: UsageError if the file names an option that does not exist, or gives one an invalid value.
    """
    options = {name: value for name, value in ctx.params.items() if name not in CALL_OPTIONS}
    type_hints = {**get_type_hints(ctx.command.callback), **extra_types}
    file_content = read_yaml(expand_path(config)) if config else {}
    for file_name, value in flatten_options(file_content).items():
        name = translate_name(file_name, {*options, *extra_types, *CALL_OPTIONS})
        if name == "out":
            continue  # the class of the command has read it
        if name not in options and name not in extra_types:
            if "stage" in file_content:
                continue  # the stage of a card may have options that this command lacks
            option_names = ", ".join(sorted({*options, *extra_types} - {"config"}))
            hint = suggest(name, {*options, *extra_types})
            raise UsageError(f"{config} names {name!r}, which is not an option{hint}; the options are {option_names}")
        if not any(_is_on_command_line(ctx, alternative) for alternative in _list_alternatives(name)):
            options[name] = _convert_value(type_hints, config or "", name, value)
    for name in (name for name in COUNT_OPTIONS if name in options):
        options[name] = parse_count(options[name])
    return options


def reads_config(command: Any) -> bool:
    """Whether a command receives `--config`, and so merges its file itself."""
    return any(option.name == "config" and option.expose_value for option in command.params)


def read_defaults(
    config: str, known_names: Collection[str | None], given: Mapping[str, Any], *, only_out: bool
) -> dict[str, Any]:
    """The values in a YAML file or card for options that the command line does not give; `only_out` reads `out` alone.

    Raises: UsageError if the file names an option that does not exist; NotFound without the file.
    """
    content = read_yaml(expand_path(config))
    names = {name for name in known_names if name and name != "config"}
    values: dict[str, Any] = {}
    for file_name, value in flatten_options(content).items():
        name = translate_name(file_name, names)
        if only_out and name != "out":
            continue
        if name not in names and "stage" not in content:
            hint = suggest(name, names)
            option_names = ", ".join(sorted(names))
            raise UsageError(
                f"{config} names {file_name!r}, which is not an option{hint}; the options are {option_names}"
            )
        is_replaced = any(given.get(alternative) is not None for alternative in _list_alternatives(name)[1:])
        if name in names and value is not None and not is_replaced:
            values[name] = ",".join(map(str, value)) if name in TEXT_LISTS and isinstance(value, list) else value
    return values


def list_given(ctx: CommandContext, config: str | None) -> set[str]:
    """The options that the command line or its YAML file gives; all others have their defaults.

    Raises: UsageError for a name of Hugging Face's trainers that is no option of potstill.
    """
    file_names = flatten_options(read_yaml(expand_path(config))) if config else {}
    names = {name for name in ctx.params if _is_on_command_line(ctx, name)}
    return names | {translate_name(name, ctx.params) for name in file_names}


def _list_alternatives(name: str) -> tuple[str, ...]:
    """The option, and those that the command line may give in its place."""
    return next(((name, *group) for group in ALTERNATIVES if name in group), (name,))


def _is_on_command_line(ctx: CommandContext, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _convert_value(type_hints: Mapping[str, Any], config: str, name: str, value: Any) -> Any:
    """The value in a file, with the type that the command line gives the option.

    Raises: UsageError.
    """
    from pydantic import TypeAdapter, ValidationError

    if value is None or name in COUNT_OPTIONS:
        return value
    if isinstance(value, str) and list[str] in get_args(type_hints[name]):
        value = [value]  # one value is a list too, as on the command line
    try:
        return TypeAdapter(type_hints[name]).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(f"{config} sets {name} to {value!r}, which is invalid: {reason}") from error
