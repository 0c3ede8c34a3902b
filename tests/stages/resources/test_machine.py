from pathlib import Path

import torch

from potstill.stages.resources.machine import get_available_resources, read_available_memory


def written(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_free_memory_is_what_the_machine_has_available(tmp_path):
    meminfo = written(tmp_path / "meminfo", "MemTotal: 100 kB\nMemAvailable:   40 kB\n")
    assert read_available_memory(meminfo, tmp_path / "cgroups", tmp_path / "own") == 40 * 1024


def test_a_limit_of_the_group_or_of_one_above_it_counts(tmp_path):
    meminfo, own = written(tmp_path / "meminfo", "MemAvailable: 40 kB\n"), written(tmp_path / "own", "0::/a/b\n")
    written(tmp_path / "cgroups/a/memory.max", "9000\n")
    written(tmp_path / "cgroups/a/memory.current", "1000\n")
    written(tmp_path / "cgroups/a/b/memory.max", "max\n")
    written(tmp_path / "cgroups/a/b/memory.current", "500\n")
    assert read_available_memory(meminfo, tmp_path / "cgroups", own) == 8000


def test_the_first_version_of_groups_is_read_too(tmp_path):
    meminfo, own = written(tmp_path / "meminfo", "MemAvailable: 40 kB\n"), written(tmp_path / "own", "4:memory:/job\n")
    written(tmp_path / "cgroups/memory/job/memory.limit_in_bytes", "5000")
    written(tmp_path / "cgroups/memory/job/memory.usage_in_bytes", "6000")
    assert read_available_memory(meminfo, tmp_path / "cgroups", own) == 0
    written(tmp_path / "cgroups/memory/job/memory.limit_in_bytes", str(2**63 - 4096))  # this is how it says "none"
    assert read_available_memory(meminfo, tmp_path / "cgroups", own) == 40 * 1024


def test_a_machine_that_says_nothing_has_no_known_memory(tmp_path):
    assert read_available_memory(tmp_path / "meminfo", tmp_path / "cgroups", tmp_path / "own") is None


def test_the_room_below_a_folder_that_is_not_there_yet_is_that_of_the_one_above(tmp_path):
    assert get_available_resources(tmp_path / "not" / "yet", torch.device("cpu")).disk > 0
