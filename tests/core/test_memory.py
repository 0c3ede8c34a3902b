"""Memory is counted in bytes, its peak starts anew, and freed memory is held only as long as it should be."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from potstill.core.memory import get_peak_memory, read_proc_field, read_resident_memory

FAULTS = """
import resource, torch
from potstill.core.memory import retain_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with retain_freed_memory():
    torch.ones(2**25)
    print(faults())
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that is told to hold on")
def test_held_memory_serves_the_next_large_block_without_new_pages_and_is_given_back() -> None:
    ran = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    inside, after = map(int, ran.stdout.split())
    assert inside < 1000 < after


def test_memory_is_counted_in_bytes() -> None:
    assert 2**24 < get_peak_memory(torch.device("cpu")) < 2**45


def test_a_field_of_proc_is_read_in_bytes(tmp_path: Path) -> None:
    status = tmp_path / "status"
    assert read_resident_memory(status) == 0
    status.write_text("Name:\tpython\nVmRSS:\t   12 kB\n", encoding="utf-8")
    assert read_resident_memory(status) == 12 * 1024
    assert read_proc_field(status, "VmHWM") is None
