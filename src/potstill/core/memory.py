"""The peak memory of this process or of a device."""

import resource
import sys
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Let the peak start anew, where the system can (CUDA; Linux by `/proc/self/clear_refs`)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or not allowed: the peak is then that of the whole life of the process
        return


def get_peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on a CUDA device; on a CPU all that this process held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
