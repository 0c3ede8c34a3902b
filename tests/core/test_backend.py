"""Devices and dtypes by name."""

import platform
import resource
import sys

import pytest
import torch

from potstill.core import backend
from potstill.core.errors import UsageError


def test_a_device_is_found_by_name_and_auto_is_one_that_works() -> None:
    assert backend.device("cpu") == torch.device("cpu")
    assert torch.empty(1, device=backend.device()).numel() == 1


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be used here"):
        backend.device(name)


def test_dtypes_go_by_their_names() -> None:
    assert backend.dtype("float32") == torch.float32
    assert backend.dtype("bfloat16") == torch.bfloat16
    with pytest.raises(UsageError, match="float16"):
        backend.dtype("float16")


def test_auto_measures_once_and_chooses_one_of_the_two() -> None:
    chosen = backend.dtype("auto", on="cpu")
    assert chosen in backend.DTYPES.values()
    assert backend.dtype("auto", on="cpu") == chosen
    assert backend.compute_dtype("mps") == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of Linux")
def test_held_memory_serves_the_next_large_block_without_new_pages() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with backend.held_memory():
        assert min(faults() for _ in range(5)) < 1000
    assert faults() > 1000 or "glibc" not in platform.libc_ver()  # it was given back
