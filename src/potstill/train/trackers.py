"""TensorBoard, W&B and Trackio: where a run logs, the end of its log, and the command that shows it.

All of them write into `runs/` in the folder of the run, which the finished output keeps.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_OFFLINE

LOGS_FOLDER = "runs"  # also the name that Hugging Face's trainer gives to the folder of TensorBoard
TRACKIO_VARIABLE = "TRACKIO_DIR"


def describe_log(tracker: str, out: Path) -> str:
    """The place of a tracker's log after the run that wrote `out`, and the command that shows it."""
    if tracker == "tensorboard":
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(out / LOGS_FOLDER)
        return f"TensorBoard's log is in {folder}; show it with: tensorboard --logdir {folder}"
    if tracker == "wandb":
        folder = str(Path(os.environ.get("WANDB_DIR") or out / LOGS_FOLDER) / "wandb")
        return f"W&B's log is in {folder}; upload the log of an offline run with: wandb sync {folder}/offline-run-*"
    folder = os.environ.get(TRACKIO_VARIABLE) or str(out / LOGS_FOLDER / "trackio")
    return f"Trackio's log is in {folder}; show it with: {TRACKIO_VARIABLE}={folder} trackio show"


@contextlib.contextmanager
def open_logs(trackers: Sequence[str], folder: Path, *, title: str) -> Iterator[None]:
    """Let W&B and Trackio log into `folder`/runs inside the block, and end their logs after it.

    Hugging Face's trainer opens them without a folder, asks for a W&B login, and leaves W&B open. So this opens them
    first.
    """
    with contextlib.ExitStack() as stack:
        if "wandb" in trackers:
            stack.enter_context(_open_wandb(folder / LOGS_FOLDER, title=title))
        if "trackio" in trackers:
            stack.enter_context(_open_trackio(folder / LOGS_FOLDER / "trackio"))
        yield


@contextlib.contextmanager
def _open_wandb(folder: Path, *, title: str) -> Iterator[None]:
    """A run of W&B in `folder`, or the one that the caller has open.

    It uploads with the credentials of this machine. Without any, or with `$HF_HUB_OFFLINE`, it is offline.
    `$WANDB_MODE` overrides both.
    """
    wandb: Any = importlib.import_module("wandb")
    if wandb.run is not None:
        yield
        return
    folder = Path(os.environ.get("WANDB_DIR") or folder)
    folder.mkdir(parents=True, exist_ok=True)
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_login(wandb) else "offline")
    settings = wandb.Settings(silent=mode == "offline", console="off")
    project = os.environ.get("WANDB_PROJECT", "huggingface")  # as Hugging Face's trainer calls it
    run = wandb.init(dir=folder, mode=mode, project=project, name=title, settings=settings)
    try:
        yield
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _has_wandb_login(wandb: Any) -> bool:
    return not HF_HUB_OFFLINE and bool(wandb.login(prompt=False, verify=False))


@contextlib.contextmanager
def _open_trackio(folder: Path) -> Iterator[None]:
    """Let Trackio log into `folder`, or into `$TRACKIO_DIR`; it reads that variable when it is imported.

    What it prints goes to stderr, since stdout has the result of the command.
    """
    is_given = bool(os.environ.get(TRACKIO_VARIABLE))
    if not is_given:
        os.environ[TRACKIO_VARIABLE] = str(folder)
        _forget_trackio()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            trackio: Any = importlib.import_module("trackio")
            if trackio.context_vars.current_run.get() is not None:  # the run ended with an error
                trackio.finish()
            if not is_given:
                del os.environ[TRACKIO_VARIABLE]
                _forget_trackio()


def _forget_trackio() -> None:
    """Let the next import of Trackio read its folder again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        del sys.modules[name]
