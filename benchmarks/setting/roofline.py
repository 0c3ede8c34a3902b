"""The speed of this machine's matrix products now."""

import time

import torch


def roofline(size: int = 4096, *, repeats: int = 3) -> float:
    """FLOP/s of a large square product in bf16, the fastest of `repeats`."""
    a = torch.randn(size, size, dtype=torch.bfloat16)
    a @ a
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
