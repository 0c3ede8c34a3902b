"""Messages of a stage on stderr, and errors for a disk that cannot be written."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from potstill.core.errors import ArtifactError
from potstill.core.notes import print_note as print_note
from potstill.core.notes import print_warning as print_warning
from potstill.core.screen import SCREEN_FLAGS

TORCH_WRITE_ERRORS = (
    "PytorchStreamWriter",
    "inline_container",
    "open file failed",
)  # in torch.save's errors, which have no errno

Extra = TypeVar("Extra")


def attempt(name: str, make: Callable[[], Extra], default: Extra, failures: dict[str, str]) -> Extra:
    """What `make` returns, or `default` where it fails; the reason goes to stderr and to `failures` under `name`.

    It catches every error, because a failed description must not lose the result.
    """
    try:
        return make()
    except Exception as error:
        failures[name] = " ".join(f"{type(error).__name__}: {error}".split())
        print_note(f"the {name} failed ({failures[name]}); everything else is saved")
        return default


@contextlib.contextmanager
def explain_write_errors(out: Path) -> Iterator[None]:
    """Turn a write error of any library into one sentence, and delete folders that are new and empty.

    Raises: ArtifactError if writing `out` failed.
    """
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ArtifactError(
            f"writing {out} failed: {reason}; free some space there, or choose another --out"
        ) from error
    except RuntimeError as error:
        if not any(marker in str(error) for marker in TORCH_WRITE_ERRORS):
            raise
        raise ArtifactError(
            f"writing {out} failed, most likely because the disk is full; free some space and run again"
        ) from error
    finally:
        for folder in new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails for a folder that is not empty


def get_command() -> str:
    """The command line of this process, quoted for a shell."""
    program, *arguments = sys.argv
    if Path(program).name in ("potstill", "__main__.py"):
        return shlex.join(["potstill", *(argument for argument in arguments if argument not in SCREEN_FLAGS)])
    return shlex.join(["python", *sys.argv]) if Path(program).suffix == ".py" else "Python, interactively"
