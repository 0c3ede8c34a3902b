"""The options that verbs share, each declared once."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from potstill.core.errors import ArtifactError, NotFound, UsageError

if TYPE_CHECKING:
    CommandContext = typer.Context
else:
    CommandContext = typer.Context.__mro__[1]  # what typer passes where it asks for its own subclass to be named

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else goes to stderr.")]
Teacher = Annotated[  # one; a list, so that a second one is refused and does not take the first one's place
    list[str] | None, typer.Option("--teacher", help="A hub id, a folder, a .gguf file, or smollm2.", metavar="TEXT")
]
Teachers = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher",
        help="A hub id, a folder, a .gguf file, smollm2, or a server: http://HOST:PORT/v1#MODEL. Several may teach "
        "together, as NAME=TEACHER each, caches too; the first is measured beside.",
    ),
]
Combine = Annotated[
    str,
    typer.Option(help="How several teachers teach: average, confidence (in the text) or route:COLUMN of the data."),
]
Out = Annotated[str, typer.Option(help="The folder to make.")]
Keep = Annotated[float | None, typer.Option(help="Share of all stored parameters to keep, in (0, 1].")]
Params = Annotated[str | None, typer.Option(help="Parameters to keep, such as 60M.")]
Strategy = Annotated[
    str, typer.Option(help="What is cut: depth, width, both, ffn; auto: depth from a share of 0.7 on, below it both.")
]
Data = Annotated[str, typer.Option(help="stdlib, a file, a folder, or a hub data set id.")]
Columns = Annotated[
    str, typer.Option(help="Which column is which, as in prompt=instruction,response=text; by default told by name.")
]
EvalData = Annotated[str | None, typer.Option(help="Held-out text; by default the data's own validation split.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file or smollm2.")]
Student = Annotated[
    str | None, typer.Option(help="A smaller model; its tokens may differ with --objective dskdv2_eta.")
]
Objective = Annotated[
    str,
    typer.Option(
        help="A divergence (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, adaptive_kl, total_variation), with "
        "options after a colon (jsd:beta=0.3); a method of docs/objectives.md (dskd, dskdv2_eta, uld, ...); "
        "cross_entropy, for no teacher; a sum (0.6*cross_entropy+0.4*forward_kl); or your own FILE.py:FUNCTION."
    ),
]
CrossEntropy = Annotated[float, typer.Option(help="Share of cross-entropy in the loss, 0 to 1.")]
Temperature = Annotated[float, typer.Option(help="Both logits are divided by it; the loss times its square.")]
Documents = Annotated[int, typer.Option(help="Held-out documents to measure on.")]
Prompts = Annotated[int, typer.Option(help="Prompts to answer for ROUGE-L, on prompt/response data.")]
SkipDoctor = Annotated[
    bool, typer.Option("--skip-doctor", help="Train even where an invariant of the pair does not hold.")
]
Tokens = Annotated[str, typer.Option(help="Tokens to train on, such as 200k or 2M.")]
Context = Annotated[int, typer.Option(help="Longest document window, in tokens.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens per optimiser step.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between evaluations; 0 is none before the end.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; 0 is a tenth of the run, at least 10.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="What matrices are multiplied in: auto (measured), bfloat16 or float32.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
MicroTokens = Annotated[int, typer.Option(help="Tokens per pass; fewer need less memory, not another result.")]
CheckpointActivations = Annotated[
    bool,
    typer.Option("--checkpoint-activations", help="Compute the student's blocks twice: less memory, more time."),
]
Compile = Annotated[bool, typer.Option("--compile", help="Run the layers through torch.compile, where it works.")]
Shard = Annotated[
    bool,
    typer.Option("--shard", help="Under torchrun: split weights, gradients and optimizer states over the processes."),
]
ReferenceTeacher = Annotated[
    str | None,
    typer.Option("--teacher", help="Measure KL to it and agreement with it too, for models of its tokenizer."),
]
Tasks = Annotated[list[str] | None, typer.Option(help="An lm-eval task (needs the extra 'eval'); repeat for several.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last whole checkpoint.")]
Config = Annotated[
    str | None, typer.Option(help="A YAML file of these options, or a card.json; the command line wins.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, with every default, and stop.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run code.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")]

SIZE_OPTIONS = ("student", "keep", "params")  # one of them; if the command line gives one, a file's other falls away
CALL_OPTIONS = ("out", "config", "overwrite", "resume", "dry_run", "as_json")  # of the call, not of the run

COUNT_OPTIONS = ("tokens", "params")  # written as 200k or 60M

COUNT_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgb]?)", re.IGNORECASE)
UNIT_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def parse_count(text: str | int | None) -> int | None:
    """`60M`, `200k` or `1.5G` as a number.

    Raises: UsageError if it is none.
    """
    if text is None:
        return text
    match = COUNT_PATTERN.fullmatch(str(text).strip().replace("_", "").replace(",", ""))
    number = 0 if match is None else round(float(match[1]) * UNIT_FACTORS[match[2].lower()])
    if number < 1:
        raise UsageError(f"{text!r} is no count; write 200000, 200k or 60M")
    return number


def get_single_teacher(teachers: Sequence[str] | None) -> str:
    """The one teacher's name.

    Raises: UsageError if none is given, or several.
    """
    if not teachers:
        raise UsageError("a teacher is needed; give --teacher, such as smollm2")
    if len(teachers) > 1:
        raise UsageError(f"one teacher is taken here, and {len(teachers)} are given; give one of them at a time")
    return teachers[0]


def expand_path(text: str) -> Path:
    """A path with the home folder expanded."""
    return Path(text).expanduser()


def check_output_file(out: str | None) -> None:
    """Refuse a file that cannot be written, before anything is spent.

    Raises: NotFound, UsageError, ArtefactError.
    """
    if out is None:
        return
    file = expand_path(out).absolute()
    if not file.parent.is_dir():
        raise NotFound(f"there is no folder {file.parent} to write {file.name} in; make it first")
    if file.is_dir():
        raise UsageError(f"{out} is a folder; give the name of a file")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"no permission to write in {file.parent}; choose another --out")


def get_number_types(stage: type) -> dict[str, type]:
    """The fields of a dataclass that are numbers, with their type."""
    return {field.name: field.type for field in dataclasses.fields(stage) if field.type in (int, float)}


def merge_options(ctx: CommandContext, config: str | None, extra_types: Mapping[str, type]) -> dict[str, Any]:
    """The options of a verb: those of its YAML file (or of the stage in a card), overridden by the command line's own.

    `also` are settings that a file may hold though there is no option for them.

    Raises: UsageError if the file names an option that does not exist, or gives one a value that it cannot take.
    """
    options = {name: value for name, value in ctx.params.items() if name not in CALL_OPTIONS}
    type_hints = {**get_type_hints(ctx.command.callback), **extra_types}
    file_content = _read_yaml(expand_path(config)) if config else {}
    for name, value in _flatten_options(file_content).items():
        if name not in options and name not in extra_types:
            if "stage" in file_content:
                continue  # a card says more of its stage than another verb asks
            option_names = ", ".join(sorted({*options, *extra_types} - {"config"}))
            raise UsageError(f"{config} names {name!r}, which is no option; options are {option_names}")
        if not _is_on_command_line(ctx, name) and not (
            name in SIZE_OPTIONS and any(_is_on_command_line(ctx, size) for size in SIZE_OPTIONS)
        ):
            options[name] = _convert_value(type_hints, config or "", name, value)
    for name in COUNT_OPTIONS:
        options[name] = parse_count(options[name])
    return options


def _is_on_command_line(ctx: CommandContext, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _convert_value(type_hints: Mapping[str, Any], config: str, name: str, value: Any) -> Any:
    """The value of a file as the command line would have read it."""
    from pydantic import TypeAdapter, ValidationError

    if value is None or name in COUNT_OPTIONS:
        return value
    if isinstance(value, str) and list[str] in get_args(type_hints[name]):
        value = [value]  # given once on a command line, it is a list too
    try:
        return TypeAdapter(type_hints[name]).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UsageError(f"{config} gives {name} as {value!r}, which it cannot be: {reason}") from error


def _flatten_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's options by their names on the command line; a card's stage, with its objective and settings, too."""
    if isinstance(content.get("stage"), Mapping):  # a whole card
        content = content["stage"]
    options = {name.replace("-", "_"): value for name, value in content.items() if name != "stage"}
    options |= options.pop("settings", None) or {}
    objective = options.get("objective")
    if isinstance(objective, Mapping):
        objective_options = ",".join(f"{name}={value}" for name, value in (objective.get("options") or {}).items())
        options |= {name: value for name, value in objective.items() if name not in ("name", "options")}
        options["objective"] = (
            f"{objective.get('name')}:{objective_options}" if objective_options else objective.get("name")
        )
    if "learning_rate" in options:
        options["lr"] = options.pop("learning_rate")
    return options


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {file}") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UsageError(f"{file} must hold options by name, such as `tokens: 2M`")
    return content
