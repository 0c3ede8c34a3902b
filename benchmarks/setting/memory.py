"""How much of its memory a process has had in RAM, by Linux's own count (proc(5)).

`ru_maxrss` will not do for a small child of a large parent: Linux hands the parent's mark on across the exec.
"""

from pathlib import Path

PROCESS = Path("/proc/self")
FORGET_PEAK = "5"  # what clear_refs calls it


def resident() -> int:
    """Bytes that are in RAM now."""
    return _status("VmRSS")


def peak() -> int:
    """The most bytes that were in RAM at once, since the start or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """The peak begins anew, at what is in RAM now."""
    (PROCESS / "clear_refs").write_text(FORGET_PEAK)


def _status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
