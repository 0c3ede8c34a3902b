"""How much room this machine has: memory that a process may still take, and disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

MEMINFO, CGROUPS, OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Room:
    """Bytes that are free; `memory` is None where the machine does not say."""

    memory: int | None
    disk: int


def room(folder: Path, device: torch.device) -> Room:
    """What is free for a run that writes below `folder` and computes on `device`."""
    standing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return Room(memory, shutil.disk_usage(standing).free)


def free_memory(meminfo: Path = MEMINFO, cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int | None:
    """The least of what the machine has available and what the control groups of this process leave; None if unsaid."""
    found = [_available(meminfo), *(_left(folder) for folder in _groups(cgroups, own))]
    return min((free for free in found if free is not None), default=None)


def resident(status: Path = Path("/proc/self/status")) -> int:
    """The memory that this process holds now, in bytes; 0 where the machine does not say."""
    return _field(status, "VmRSS") or 0


def _available(meminfo: Path) -> int | None:
    return _field(meminfo, "MemAvailable")


def _field(file: Path, name: str) -> int | None:
    """`Name:  123 kB` in bytes."""
    if not file.is_file():
        return None
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return next((1024 * int(words[1]) for words in lines if words and words[0] == f"{name}:"), None)


def _groups(cgroups: Path, own: Path) -> list[Path]:
    """The control group of this process and all above it, of either version; a container often sees its own as root."""
    lines = own.read_text(encoding="utf-8").split() if own.is_file() else []
    roots = [cgroups, cgroups / "memory"]
    named = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    inner = [path.strip("/") for _, kind, path in named if kind == "" or "memory" in kind.split(",")]
    folders = [root / path for root in roots for path in ("", *inner)]
    return [one for folder in folders for one in (folder, *folder.parents) if cgroups in (one, *one.parents)]


def _left(group: Path) -> int | None:
    """Limit less use of one group; None where it sets no limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        files = group / limit, group / used
        if all(file.is_file() for file in files):
            said, taken = (file.read_text(encoding="utf-8").strip() for file in files)
            if said.isdigit() and int(said) < 2**60:  # version 1 says a huge number for no limit
                return max(0, int(said) - int(taken))
    return None
