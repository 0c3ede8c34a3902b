"""Memory of this process and of a device: the current use, the peak, and the return of freed memory."""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

STATUS = Path("/proc/self/status")
RESET_PEAK = "5"  # proc(5): written to clear_refs, it resets the peak of the resident set
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DEFAULT_TRIM_THRESHOLD, DEFAULT_MMAP_MAX = 128 * 1024, 65536  # glibc's own


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of a CUDA device, or on Linux of this process; elsewhere it remains the peak since the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # another system, or not permitted
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="utf-8")


def get_peak_memory(device: torch.device) -> int:
    """Bytes at the peak: what torch allocated on a CUDA device, or the resident memory of this process on a CPU.

    On Linux it reads `VmHWM`, because `ru_maxrss` of a new process begins at the peak of its parent. It is 0 where the
    system does not report it, as on Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = read_proc_field(STATUS, "VmHWM")
    if peak is not None:
        return peak
    if resource is None:
        return 0
    max_resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max_resident if sys.platform == "darwin" else max_resident * 1024


def read_resident_memory(status: Path = STATUS) -> int:
    """The resident memory of this process in bytes; 0 if the system does not report it."""
    return read_proc_field(status, "VmRSS") or 0


def read_proc_field(file: Path, name: str) -> int | None:
    """The bytes that a line `Name:  123 kB` of a file in /proc gives; None without the file or the line."""
    if not file.is_file():
        return None
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return next((1024 * int(words[1]) for words in lines if words and words[0] == f"{name}:"), None)


@contextlib.contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Inside the block, this process keeps freed memory for its next allocation; at the end it returns the memory.

    glibc maps every large block again, and the system zeroes each page at its first use. A training step allocates the
    same 100 MiB of logits and gradients every time, so this costs about 10 % of a step on a CPU. Without glibc's
    `mallopt` nothing happens.
    """
    mallopt = getattr(_load_libc(), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(M_MMAP_MAX, DEFAULT_MMAP_MAX)
        mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
        trim_memory()


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can."""
    if malloc_trim := getattr(_load_libc(), "malloc_trim", None):
        malloc_trim(0)


@functools.cache
def _load_libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # on Windows, which has no library without a name
        return None
