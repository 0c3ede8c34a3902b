"""Prints the memory and disk of a run before it trains, and refuses a disk that is too small."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import ArtifactError
from potstill.core.memory import read_resident_memory
from potstill.stages.console import print_note
from potstill.stages.resources.activation_memory import measure_autograd_bytes
from potstill.stages.resources.estimate import GIB, measure_tokenizer_bytes
from potstill.stages.resources.machine import AvailableResources, get_available_resources
from potstill.stages.resources.workload import Workload


def report_workload(
    work: Workload,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    dtype: torch.dtype,
    show: bool = True,
) -> None:
    """Print the memory and disk that a run takes; without `show`, only too little memory.

    Raises: ArtifactError if the disk has too little room.
    """
    available = get_available_resources(out, device)
    disk_bytes = work.disk_bytes(measure_tokenizer_bytes(tokenizer))["most"]
    memory_bytes = sum(work.memory_bytes(measure_autograd_bytes(work.student, dtype=dtype, lora=work.lora)).values())
    check_disk(disk_bytes, available.disk, out)
    summary, is_sufficient = _format_summary(
        memory_bytes, disk_bytes, available, on_cpu=device.type == "cpu", model_bytes=work.model_bytes
    )
    if show or not is_sufficient:
        print_note(summary)


def check_disk(disk_bytes: float, free_bytes: int, out: Path) -> None:
    """Refuse a disk with less room than a run takes.

    Raises: ArtifactError.
    """
    if disk_bytes > free_bytes:
        raise ArtifactError(
            f"the run takes {disk_bytes / GIB:.2f} GiB of disk, and {out} has {free_bytes / GIB:.2f} GiB; make room, "
            f"or choose another --out"
        )


def _format_summary(
    memory_bytes: float, disk_bytes: float, available: AvailableResources, *, on_cpu: bool, model_bytes: float
) -> tuple[str, bool]:
    """One line about memory and disk, and whether the memory is enough."""
    process_bytes = read_resident_memory() if on_cpu else model_bytes
    memory_bytes += max(process_bytes - model_bytes, 0.0)
    summary = f"the run takes about {memory_bytes / GIB:.1f} GiB of memory and {disk_bytes / GIB:.2f} GiB of disk"
    if available.memory is None or memory_bytes - process_bytes <= available.memory:
        return summary, True
    available_gib = (available.memory + process_bytes) / GIB
    return f"{summary}, but only {available_gib:.1f} GiB of memory can be had; potstill plan says what to change", False
