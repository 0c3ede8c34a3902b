"""The device and the dtype to compute in, and `torch.compile` with a fallback."""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from potstill.core.errors import UsageError, get_first_line

log = logging.getLogger("potstill")
RECOMPILE_LIMIT = 64  # two models, with and without gradients, in a few dtypes exceed torch's limit of 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAVE_DTYPES = {**DTYPES, "float16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is the GPU where there is one, else the CPU.

    Raises: UsageError if this machine has no such device, or potstill does not compute on it.
    """
    if name.partition(":")[0] == "mps":
        raise UsageError("device 'mps' has no float64, in which potstill sums its losses; give --device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(name)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here ({get_first_line(error)}); try cpu") from error
    return resolved


def resolve_dtype(name: str = "auto", *, device_type: str = "cpu", default: str = "auto") -> torch.dtype:
    """The dtype called `name`; `auto` is `default`, and where that is `auto` too, the result of `compute_dtype`.

    Raises: UsageError for another name than float32, bfloat16 or auto.
    """
    name = default if name == "auto" else name
    if name == "auto":
        return compute_dtype(device_type)
    if name in ("float16", "fp16", "half"):
        raise UsageError(
            f"dtype {name!r} is not computed in, since its range is too small for gradients; give --dtype bfloat16 or "
            f"float32 (--save-dtype float16 saves in it)"
        )
    if name not in DTYPES:
        raise UsageError(f"there is no dtype {name!r}; choose auto, {' or '.join(DTYPES)}")
    return DTYPES[name]


def get_dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as options and cards write it: `float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def compute_dtype(device_type: str = "cpu") -> torch.dtype:
    """bfloat16 where this device multiplies matrices faster in it than in float32, else float32.

    Many CPUs compute in bf16 only through slow conversions. So on a CPU potstill times both, once per process (about 50
    ms). A small product settles it where bf16 is many times slower.
    """
    if device_type.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if not device_type.startswith("cpu"):
        return torch.float32
    for size in (96, 768):
        bfloat16_seconds, float32_seconds = (
            _time_product(candidate, size=size) for candidate in (torch.bfloat16, torch.float32)
        )
        if bfloat16_seconds > 4 * float32_seconds:
            break
    fastest = torch.bfloat16 if bfloat16_seconds < 0.8 * float32_seconds else torch.float32
    log.info(
        "computing in %s: a product takes %.2f ms in bf16, %.2f ms in fp32",
        fastest,
        1e3 * bfloat16_seconds,
        1e3 * float32_seconds,
    )
    return fastest


def _time_product(dtype: torch.dtype, *, size: int, repeats: int = 5) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    matrix @ matrix
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)


@contextlib.contextmanager
def compile_modules(modules: Iterable[nn.Module], *, backend: str = "inductor") -> Iterator[None]:
    """Run each module through `torch.compile` inside the block, for any shapes; weights and their names do not change.

    If the compiler `backend` is missing or fails, potstill logs one warning and runs the modules uncompiled.
    """
    module_list, compiler = list(modules), _get_compiler(backend)
    for module in module_list:
        module.compile(backend=compiler, dynamic=True)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield
    finally:
        for module in module_list:
            module._compiled_call_impl = None


@functools.cache
def _get_compiler(name: str) -> Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]:
    """The compiler called `name`; after its first failure it returns every graph uncompiled."""
    works = True

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal works
        if works:
            try:
                with torch._functorch.config.patch(
                    force_non_lazy_backward_lowering=True
                ):  # so that its failures show here
                    return torch._dynamo.lookup_backend(name)(graph, inputs)
            except torch._dynamo.exc.RestartAnalysis:
                raise  # no failure: the tracer begins again, with numbers such as a scale as constants
            except Exception as error:  # a compiler, its C++ compiler or a missing library may raise any type
                works = False
                log.warning("note: torch.compile fails here (%s), so nothing is compiled", get_first_line(error))
        return graph.forward

    return compile_graph
