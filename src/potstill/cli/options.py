"""The options that verbs share, each declared once."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from potstill.core.errors import NotFound, UsageError

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; all else goes to stderr.")]
Teacher = Annotated[str, typer.Option(help="A hub id, a folder, a .gguf file, or smollm2.")]
Out = Annotated[str, typer.Option(help="The folder to make.")]
Keep = Annotated[float | None, typer.Option(help="Share of all stored parameters to keep, in (0, 1].")]
Params = Annotated[str | None, typer.Option(help="Parameters to keep, such as 60M.")]
Strategy = Annotated[str, typer.Option(help="What is cut: depth, width, both or ffn.")]
Data = Annotated[str, typer.Option(help="stdlib, a file, a folder, or a hub data set id.")]
EvalData = Annotated[str | None, typer.Option(help="Held-out text; by default the data's own validation split.")]
Tokens = Annotated[str, typer.Option(help="Tokens to train on, such as 200k or 2M.")]
Context = Annotated[int, typer.Option(help="Longest document window, in tokens.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens per optimiser step.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between evaluations; 0 is none before the end.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; 0 is a tenth of the run.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="What matrices are multiplied in: auto (measured), bfloat16 or float32.")]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last whole checkpoint.")]
Config = Annotated[str | None, typer.Option(help="A YAML file with any of these options; the command line wins.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, with every default, and stop.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights, which can run code.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with a model.")]

COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgb]?)", re.IGNORECASE)
FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def count(text: str | int | None) -> int | None:
    """`60M`, `200k` or `1.5G` as a number.

    Raises: UsageError if it is none.
    """
    if text is None or isinstance(text, int):
        return text
    hit = COUNT.fullmatch(text.strip().replace("_", "").replace(",", ""))
    if hit is None or float(hit[1]) == 0:
        raise UsageError(f"{text!r} is no count; write 200000, 200k or 60M")
    return round(float(hit[1]) * FACTORS[hit[2].lower()])


def path(text: str) -> Path:
    """A path with the home folder expanded."""
    return Path(text).expanduser()


def merge(context: typer.Context, config: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a verb: those of its YAML file, overridden by what the command line says itself.

    Raises: UsageError if the file names an option that does not exist.
    """
    options = {name: given[name] for name in context.params if name in given}
    if config is not None:
        for name, value in _read(path(config)).items():
            name = name.replace("-", "_")
            if name not in options:
                raise UsageError(
                    f"{config} names {name!r}, which is no option; options are {', '.join(sorted(options))}"
                )
            if context.get_parameter_source(name) .name == "DEFAULT":  # type: ignore[union-attr]
                options[name] = value
    for name in ("tokens", "params"):
        if name in options:
            options[name] = count(options[name])
    return options


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {file}") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{file} must hold options by name, such as `tokens: 2M`")
    return found
