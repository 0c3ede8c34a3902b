"""TensorBoard, W&B and Trackio: where the log of a run lies, and the end of a log."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

TENSORBOARD_FOLDER = "runs"  # in the output folder of Hugging Face's trainer


def describe_log(tracker: str, out: Path) -> str:
    """The place of a tracker's log after the run that wrote `out`, and the command that shows it."""
    if tracker == "tensorboard":
        folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(out / TENSORBOARD_FOLDER)
        return f"TensorBoard's log is in {folder}; show it with: tensorboard --logdir {folder}"
    if tracker == "wandb":
        folder = str(Path(os.environ.get("WANDB_DIR") or ".") / "wandb")
        return f"W&B's log is in {folder}; upload the log of an offline run with: wandb sync {folder}/offline-run-*"
    default = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "trackio"
    return f"Trackio's log is in {os.environ.get('TRACKIO_DIR') or default}; show it with: trackio show"


def finish_logs(trackers: Sequence[str]) -> None:
    """End the log of W&B, which Hugging Face's trainer leaves open, so that a next run does not write into it."""
    if "wandb" in trackers:
        importlib.import_module("wandb").finish()
