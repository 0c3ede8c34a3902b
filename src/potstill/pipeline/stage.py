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

from potstill.core.artefact import Parent
from potstill.core.errors import ArtefactError, UsageError
from potstill.models.load import Loaded
from potstill.train import ranks
from potstill.transforms.fit import AUTO, STRATEGIES

FREE = ("skip_doctor", "compile", "checkpoint_activations")  # options of a stage that change no result
TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "open file failed")  # torch.save names no errno


def as_value(stage: Any) -> dict[str, Any]:
    """A stage as plain data under its kind, as JSON gives it back: for cards, `--dry-run` and `--config`."""
    plain: dict[str, Any] = json.loads(json.dumps({"stage": stage.kind, **asdict(stage)}))
    return plain


def essence(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage as plain data, with what changes no result left off: what a run that is resumed has to agree in."""
    plain = {name: essence(value) if isinstance(value, Mapping) else value for name, value in stage.items()}
    return {name: False if name in FREE else value for name, value in plain.items()}


def parent(role: str, loaded: Loaded) -> Parent:
    """What a card says of a model that was read."""
    return Parent(role=role, name=loaded.name, digest=loaded.digest, licence=loaded.licence, note=loaded.note)


def require_size(sizes: Mapping[str, Any], *, also: bool = False) -> None:
    """Refuse a size that is none: exactly one of `sizes` (option to value) is given, unless `also` something else is.

    Raises: UsageError.
    """
    given = [f"--{name}" for name, value in sizes.items() if value is not None]
    if len(given) > 1 or not (given or also):
        options = [f"--{name}" for name in sizes]
        choices = f"{', '.join(options[:-1])} or {options[-1]}"
        raise UsageError(f"a size is needed: one of {choices}; you gave {' and '.join(given) or 'none of them'}")
    keep, params = sizes.get("keep"), sizes.get("params")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep is {keep}; it is a share of the parameters, above 0 and at most 1")
    if params is not None and params < 1:
        raise UsageError(f"--params is {params}; it must be at least 1")


def require_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of `choices`.

    Raises: UsageError.
    """
    if value not in choices:
        raise UsageError(f"--{option} {value!r} is none of {', '.join(choices)}")


def require_strategy(name: str) -> None:
    """Refuse a strategy that there is none of.

    Raises: UsageError.
    """
    require_choice("strategy", name, (AUTO, *STRATEGIES))


def require_apart(out: Path, *inputs: str | None) -> None:
    """Refuse to write over what is read.

    Raises: UsageError if one of `inputs` is the folder `out`, or lies inside it.
    """
    target = out.expanduser().resolve()
    for name in inputs:
        source = Path(name).expanduser() if name else None
        if source is not None and source.exists() and target in (source.resolve(), *source.resolve().parents):
            raise UsageError(f"--out {out} would write over {name}, which is read; choose another folder")


def require_one_process() -> None:
    """Refuse a launcher of several processes, each of which would write the same folder.

    Raises: UsageError.
    """
    if ranks.count() > 1:
        raise UsageError("this stage runs in one process, and distill alone in several; start it without torchrun")


def note(text: str) -> None:
    """One line on stderr about something that is as it should be, but that one would want to know."""
    if ranks.first():
        print(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def waiting(text: str, *, show: bool) -> Iterator[None]:
    """A line on stderr while something takes its time."""
    with Console(stderr=True).status(text) if show else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def disk(out: Path) -> Iterator[None]:
    """Says in one sentence that writing `out` failed, whichever library below found out; no new empty folder is left.

    Raises: ArtefactError.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ArtefactError(f"writing {out} failed: {reason}; make room there, or choose another --out") from error
    except RuntimeError as error:
        if not any(sign in str(error) for sign in TORCH_WRITER):
            raise
        raise ArtefactError(f"writing {out} failed, most likely for want of room; make some and run again") from error
    finally:
        for folder in new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only what is empty goes


def command() -> str:
    """How this process was started, as a shell would take it again."""
    program, *rest = sys.argv
    if Path(program).name in ("potstill", "__main__.py"):
        return shlex.join(["potstill", *(word for word in rest if word != "--debug")])
    return shlex.join(["python", *sys.argv]) if Path(program).suffix == ".py" else "Python, interactively"
