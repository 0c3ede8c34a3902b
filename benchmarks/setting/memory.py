"""The resident memory of this process, as Linux counts it (proc(5)).

`ru_maxrss` does not work for a small child of a large parent, because Linux passes the parent's peak on at exec.
"""

from pathlib import Path

PROCESS = Path("/proc/self")
FORGET_PEAK = "5"  # what clear_refs calls it


def resident_bytes() -> int:
    """Bytes that are resident now."""
    return _read_status("VmRSS")


def peak() -> int:
    """The largest number of resident bytes since the start or since `reset_peak`."""
    return _read_status("VmHWM")


def reset_peak() -> None:
    """Resets the peak to the bytes that are resident now."""
    (PROCESS / "clear_refs").write_text(FORGET_PEAK)


def _read_status(name: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
