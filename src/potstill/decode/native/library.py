"""Compiles `decoder.c` with its headers for this processor, once, and describes its structures.

The library stays in the user's cache folder, under a name that follows from the source, the compiler and the processor.
Without a compiler there is no library, and models decode by their own code.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

log = logging.getLogger("potstill")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("decoder.c", "ternary.h", "products.h"))
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC", "-Wno-psabi")
# tried in this order: not every compiler knows its processor, or has OpenMP
OPTIONAL_FLAGS = (("-march=native", "-fopenmp"), ("-fopenmp",), ("-march=native",), ())
COMPILERS = ("cc", "gcc", "clang")
_NUMBER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`Matrix` of the source."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "scale", "bias", "gain")),
        *((name, _NUMBER) for name in ("rows", "columns", "stride", "dtype")),
        ("eps", ctypes.c_float),
    )


class Layer(ctypes.Structure):
    """`Layer` of the source."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _POINTER) for name in ("mixer_norm", "mixer_post_norm", "ffn_norm", "ffn_post_norm")),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "cos", "sin", "keys", "values")),
        *((name, _NUMBER) for name in ("heads", "kv_heads", "head_dim", "window", "activation")),
        ("scale", ctypes.c_float),
    )


class Network(ctypes.Structure):
    """`Network` of the source."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("norm", _POINTER),
        *((name, _NUMBER) for name in ("num_layers", "hidden", "capacity", "threads")),
        ("norm_eps", ctypes.c_float),
    )


class Pass(ctypes.Structure):
    """`Pass` of the source."""

    _fields_ = (
        *((name, _POINTER) for name in ("rows", "lengths", "starts", "counts", "positions", "tree")),
        *((name, _NUMBER) for name in ("num_texts", "num_tokens", "width")),
        *((name, _POINTER) for name in ("x", "q", "k", "v", "attended", "inner", "y", "scratch")),
        *((name, _NUMBER) for name in ("scratch_size", "span")),
    )


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled source, or None where there is no compiler that accepts it."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None or platform.system() == "Windows":
        log.info("there is no C compiler, so models decode by their own, slower code; install gcc or clang")
        return None
    path = get_cache_folder() / f"decoder-{_compute_digest(compiler)}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        log.info("the decoder in C is not used, so models decode by their own, slower code: %s", error)
        return None
    library.potstill_decode.argtypes = (ctypes.POINTER(Network), ctypes.POINTER(Pass))
    library.potstill_multiply.argtypes = (ctypes.POINTER(Matrix), _POINTER, _POINTER, _NUMBER, _NUMBER)
    return library


def get_cache_folder() -> Path:
    """Where compiled libraries stay: `potstill` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "potstill"


def _compute_digest(compiler: str) -> str:
    """A name for this source, compiler and processor."""
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text(errors="replace").splitlines() if processor.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    parts = (source, compiler, platform.machine(), features, str(FLAGS))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Writes the library to `path`, whole or not at all.

    Raises: OSError with the compiler's message.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    message = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        for flags in OPTIONAL_FLAGS:
            command = [compiler, *FLAGS, *flags, "-o", str(output), str(SOURCES[0]), "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                os.replace(output, path)
                return
            message = result.stderr.strip().splitlines()[0] if result.stderr.strip() else "the compiler failed"
    raise OSError(message)
