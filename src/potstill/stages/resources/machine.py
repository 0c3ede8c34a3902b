"""The memory and disk that are still available to a process on this machine."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from potstill.core.memory import read_proc_field

MEMINFO, CGROUPS, OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class AvailableResources:
    """Free bytes. `memory` is None if the machine does not report it."""

    memory: int | None
    disk: int


def get_available_resources(folder: Path, device: torch.device) -> AvailableResources:
    """The free bytes for a run that writes below `folder` and computes on `device`."""
    existing_folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else read_available_memory()
    return AvailableResources(memory, shutil.disk_usage(existing_folder).free)


def read_available_memory(
    meminfo: Path = MEMINFO, cgroups: Path = CGROUPS, own_cgroup: Path = OWN_CGROUP
) -> int | None:
    """The bytes available to this process: the least of the machine's and its control groups'; None if unknown."""
    limits = [
        _read_available(meminfo),
        *(_read_cgroup_headroom(folder) for folder in _find_cgroups(cgroups, own_cgroup)),
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def _read_available(meminfo: Path) -> int | None:
    return read_proc_field(meminfo, "MemAvailable")


def _find_cgroups(cgroups: Path, own_cgroup: Path) -> list[Path]:
    """The folders of this process's control groups and their parents, of both versions.

    A container often sees its own group as the root.
    """
    lines = own_cgroup.read_text(encoding="utf-8").split() if own_cgroup.is_file() else []
    roots = [cgroups, cgroups / "memory"]
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    cgroup_paths = [path.strip("/") for _, kind, path in entries if kind == "" or "memory" in kind.split(",")]
    folders = [root / path for root in roots for path in ("", *cgroup_paths)]
    return [group for folder in folders for group in (folder, *folder.parents) if cgroups in (group, *group.parents)]


def _read_cgroup_headroom(group: Path) -> int | None:
    """The limit of one group minus its use, in bytes; None if it has no limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        files = group / limit, group / used
        if all(file.is_file() for file in files):
            limit_text, used_text = (file.read_text(encoding="utf-8").strip() for file in files)
            if limit_text.isdigit() and int(limit_text) < 2**60:  # version 1 writes a huge number for no limit
                return max(0, int(limit_text) - int(used_text))
    return None
