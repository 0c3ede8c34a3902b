"""How fast the machine is, here and now."""

import time

import torch


def roofline(size: int = 4096) -> float:
    """FLOP/s of a large square product in bf16."""
    a = torch.randn(size, size, dtype=torch.bfloat16)
    a @ a
    times = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
