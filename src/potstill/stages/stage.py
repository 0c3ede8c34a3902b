"""A stage: a value that makes a folder with a card. What would go back and forth between floors is a stage."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError

from potstill.core.atomic_files import Parent
from potstill.core.errors import ArtifactError, UsageError
from potstill.models.load import LoadedModel
from potstill.train import distributed
from potstill.transforms.fit import AUTO, STRATEGIES

RESULT_NEUTRAL_OPTIONS = (
    "skip_doctor",
    "compile",
    "checkpoint_activations",
)  # options of a stage that change no result
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "open file failed")  # torch.save names no errno


def to_plain_dict(stage: Any) -> dict[str, Any]:
    """A stage as plain data under its kind, as JSON gives it back: for cards, `--dry-run` and `--config`."""
    plain: dict[str, Any] = json.loads(json.dumps({"stage": stage.kind, **asdict(stage)}))
    return plain


def reproducible_options(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage as plain data, with what changes no result left off: what a run that is resumed has to agree in."""
    plain = {
        name: reproducible_options(value) if isinstance(value, Mapping) else value for name, value in stage.items()
    }
    return {name: False if name in RESULT_NEUTRAL_OPTIONS else value for name, value in plain.items()}


def make_parent(role: str, loaded: LoadedModel) -> Parent:
    """What a card says of a model that was read."""
    return Parent(role=role, name=loaded.name, digest=loaded.digest, licence=loaded.license, note=loaded.note)


def check_size_options(sizes: Mapping[str, Any], *, has_alternative: bool = False) -> None:
    """Refuse a size that is none: exactly one of `sizes` (option to value) is given, unless `also` something else is.

    Raises: UsageError.
    """
    given_options = [f"--{name}" for name, value in sizes.items() if value is not None]
    if len(given_options) > 1 or not (given_options or has_alternative):
        options = [f"--{name}" for name in sizes]
        choices = f"{', '.join(options[:-1])} or {options[-1]}"
        raise UsageError(
            f"a size is needed: one of {choices}; you gave {' and '.join(given_options) or 'none of them'}"
        )
    keep, params = sizes.get("keep"), sizes.get("params")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep is {keep}; it is a share of the parameters, above 0 and at most 1")
    if params is not None and params < 1:
        raise UsageError(f"--params is {params}; it must be at least 1")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of `choices`.

    Raises: UsageError.
    """
    if value not in choices:
        raise UsageError(f"--{option} {value!r} is none of {', '.join(choices)}")


def check_strategy(name: str) -> None:
    """Refuse a strategy that there is none of.

    Raises: UsageError.
    """
    check_choice("strategy", name, (AUTO, *STRATEGIES))


def check_output_not_input(out: Path, *inputs: str | None) -> None:
    """Refuse to write over what is read.

    Raises: UsageError if one of `inputs` is the folder `out`, or lies inside it.
    """
    target = out.expanduser().resolve()
    for name in inputs:
        source = Path(name).expanduser() if name else None
        if source is not None and source.exists() and target in (source.resolve(), *source.resolve().parents):
            raise UsageError(f"--out {out} would write over {name}, which is read; choose another folder")


def check_single_process() -> None:
    """Refuse a launcher of several processes, each of which would write the same folder.

    Raises: UsageError.
    """
    if distributed.world_size() > 1:
        raise UsageError("this stage runs in one process, and distill alone in several; start it without torchrun")


def print_note(text: str) -> None:
    """One line on stderr about something that is as it should be, but that one would want to know."""
    if distributed.is_main_process():
        print(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def show_status(text: str, *, show: bool) -> Iterator[None]:
    """A line on stderr while something takes its time."""
    with Console(stderr=True).status(text) if show else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def explain_write_errors(out: Path) -> Iterator[None]:
    """Says in one sentence that writing `out` failed, whichever library below found out; no new empty folder is left.

    Raises: ArtefactError.
    """
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ArtifactError(f"writing {out} failed: {reason}; make room there, or choose another --out") from error
    except RuntimeError as error:
        if not any(marker in str(error) for marker in TORCH_WRITE_ERRORS):
            raise
        raise ArtifactError(f"writing {out} failed, most likely for want of room; make some and run again") from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only what is empty goes


def get_command() -> str:
    """How this process was started, as a shell would take it again."""
    program, *arguments = sys.argv
    if Path(program).name in ("potstill", "__main__.py"):
        return shlex.join(["potstill", *(argument for argument in arguments if argument != "--debug")])
    return shlex.join(["python", *sys.argv]) if Path(program).suffix == ".py" else "Python, interactively"
