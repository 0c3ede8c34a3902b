"""The program `potstill`, one command per job. A command imports torch only when it runs, so that help is quick."""

import contextlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.main

from potstill import __version__
from potstill.cli.command_class import Command
from potstill.cli.commands.advise import advise
from potstill.cli.commands.align import align
from potstill.cli.commands.arena import arena
from potstill.cli.commands.cache import cache_app
from potstill.cli.commands.convert import convert
from potstill.cli.commands.data import data
from potstill.cli.commands.distill import distill
from potstill.cli.commands.doctor import doctor
from potstill.cli.commands.edit import edit
from potstill.cli.commands.export import export
from potstill.cli.commands.frontier import frontier
from potstill.cli.commands.generate import generate
from potstill.cli.commands.measure import measure
from potstill.cli.commands.models import models
from potstill.cli.commands.plan import plan
from potstill.cli.commands.prune import prune
from potstill.cli.commands.push import push
from potstill.cli.commands.recipes import recipes
from potstill.cli.commands.run import run
from potstill.cli.commands.serve import serve
from potstill.cli.options import add_config_option, add_screen_options
from potstill.cli.output import CommandResult
from potstill.core.errors import Interrupted, PeerFailed, PotstillError
from potstill.core.notes import NoteHandler
from potstill.core.ranks import is_main_process
from potstill.core.screen import Verbosity, get_verbosity, open_screen, set_verbosity
from potstill.core.suggestions import suggest

ClickException: Any = typer.BadParameter.__mro__[2]  # of the click that typer uses
INTERRUPTED_EXIT_CODE = 130
COMPLETION_VARIABLE = "_POTSTILL_COMPLETE"  # set by a shell that asks for completions

VERBS = (
    models,
    data,
    doctor,
    plan,
    distill,
    align,
    prune,
    convert,
    edit,
    measure,
    frontier,
    arena,
    generate,
    advise,
    serve,
    run,
    recipes,
    export,
    push,
)


app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make language models small and fast: distill a teacher into a small student, and measure both. "
    "Start with `potstill distill --teacher smollm2 --keep 0.75 --out student`.",
)
for verb in VERBS:
    app.command(cls=Command)(add_screen_options(add_config_option(verb)))
app.add_typer(cache_app, name="cache")


def main() -> None:
    """The entry point. An error is one sentence on stderr and an exit code; `--debug` shows the traceback."""
    if COMPLETION_VARIABLE in os.environ:
        app(prog_name="potstill")
    arguments = sys.argv[1:]
    if not is_main_process():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # under torchrun only the first process prints
    set_verbosity(choose_verbosity(arguments))
    if "--debug" in arguments:
        sys.exit(run_command(arguments))
    if get_verbosity() < Verbosity.VERBOSE:
        silence_warnings()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up like Ctrl-C
    try:
        sys.exit(run_command(arguments))
    except KeyboardInterrupt:
        exit_with_message("stopped; potstill left no unfinished files", exit_code=INTERRUPTED_EXIT_CODE)
    except PeerFailed as error:
        sys.exit(error.exit_code)
    except Interrupted as error:
        exit_with_message(f"{error}: {get_resume_command(arguments)}", exit_code=error.exit_code)
    except PotstillError as error:
        exit_with_message(f"error: {error}", exit_code=error.exit_code)
    except ClickException as error:
        command_path = error.ctx.command_path if error.ctx else "potstill"
        exit_with_message(
            f"error: {describe_usage_error(error)} (see {command_path} --help)", exit_code=error.exit_code
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has closed the pipe
        sys.exit(1)
    except MemoryError:
        exit_with_message("error: there is not enough memory; choose a smaller --context or model", exit_code=1)
    except Exception as error:  # only --debug shows the traceback
        exit_with_message(f"error: {type(error).__name__}: {error} (--debug shows where)", exit_code=1)


def run_command(arguments: Sequence[str]) -> int:
    """Run a command and print its output, as JSON with `--json`; return the exit code.

    With `--json`, all other output goes to stderr.
    """
    as_json = "--json" in arguments
    stdout_redirect = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    command = typer.main.get_command(app)
    screen = open_screen(show=is_main_process())
    try:
        with screen, command.make_context("potstill", list(arguments) or ["--help"]) as context, stdout_redirect:
            result = context.command.invoke(context)
    except typer.Exit as exit_request:
        return exit_request.exit_code
    result, exit_code = result if isinstance(result, CommandResult) else (result, 0)
    if as_json:
        json.dump(replace_non_finite(result), sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
        print()
    return exit_code


def choose_verbosity(arguments: Sequence[str]) -> Verbosity:
    """How much the flags ask for."""
    if "--quiet" in arguments:
        return Verbosity.QUIET
    return Verbosity.VERBOSE if "--verbose" in arguments else Verbosity.NORMAL


def silence_warnings() -> None:
    """Hide the warnings of libraries; potstill's own are lines of stderr, and its errors are raised.

    The logger `potstill` reports facts of one model, such as a compiler that fails.
    """
    warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # else a logger without a handler writes to stderr
    logging.getLogger("potstill").handlers = [NoteHandler(logging.WARNING)]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def exit_with_message(text: str, *, exit_code: int) -> NoReturn:
    """Print one line to stderr, and exit."""
    print(" ".join(text.split()), file=sys.stderr)
    sys.exit(exit_code)


def describe_usage_error(error: Any) -> str:
    """The sentence of a wrong call, with the option that a misspelled one probably means."""
    if possibilities := getattr(error, "possibilities", None):
        return f"there is no option {error.option_name}{suggest(error.option_name, possibilities)}"
    return str(error.format_message()).rstrip(".")


def get_resume_command(arguments: Sequence[str]) -> str:
    """The command that resumes this one."""
    command_arguments = [argument for argument in arguments if argument not in ("--overwrite", "--resume", "--debug")]
    return shlex.join(["potstill", *command_arguments, "--resume"])


def replace_non_finite(value: Any) -> Any:
    """`value` with null for every number that is not finite, since JSON has no infinity or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): replace_non_finite(v) for k, v in value.items()}
    return [replace_non_finite(v) for v in value] if isinstance(value, list | tuple) else value


def show_version(value: bool) -> bool:
    """Print the version and exit, if `value` is set."""
    if value:
        print(__version__)
        raise typer.Exit
    return value


@app.callback()
@add_screen_options
def configure_environment(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=show_version)
    ] = False,
) -> None:
    """Make language models small and fast."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
