"""Which device, and which dtype to multiply in: chosen once, by looking and measuring, and said once."""

import functools
import logging
import time

import torch

from potstill.core.errors import UsageError

log = logging.getLogger("potstill")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is the first accelerator, else the CPU.

    Raises: UsageError if there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return found


def dtype(name: str = "auto", *, on: str = "cpu") -> torch.dtype:
    """The dtype called `name`; `auto` measures.

    Raises: UsageError for a name that is none of float32, bfloat16, auto.
    """
    if name == "auto":
        return compute_dtype(on)
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@functools.cache
def compute_dtype(on: str = "cpu") -> torch.dtype:
    """bfloat16 where a matrix product in it is faster here than in float32, else float32.

    Many CPUs take bf16 only through slow conversions, so on a CPU both are timed (some 50 ms, once a process).
    """
    if on.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if not on.startswith("cpu"):
        return torch.float32
    fast, plain = (_seconds(d) for d in (torch.bfloat16, torch.float32))
    chosen = torch.bfloat16 if fast < 0.8 * plain else torch.float32
    log.info("computing in %s: a product takes %.2f ms in bf16, %.2f ms in fp32", chosen, 1e3 * fast, 1e3 * plain)
    return chosen


def _seconds(kind: torch.dtype, *, size: int = 768, repeats: int = 5) -> float:
    a = torch.ones(size, size, dtype=kind)
    a @ a
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return min(times)
