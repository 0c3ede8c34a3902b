"""What a stage prints while it works, and how it explains that a disk is full."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from safetensors import SafetensorError

from potstill.core.errors import ArtifactError
from potstill.train import distributed

TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "open file failed")  # torch.save names no errno


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
