"""Runs a GGUF file in llama.cpp, through the package llama-cpp-python."""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from potstill.core.errors import ArtifactError
from potstill.models.gguf import PROBES
from potstill.stages.export.greedy_check import Logits

INSTALL_COMMAND = "pip install 'potstill[llama]'"
# The largest difference of a logit, relative to the largest logit, that llama.cpp's kernels explain. Blocks of 8 or 4
# bits are multiplied with activations that are rounded to 8 bits.
ROUNDING = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2, "q8_0": 0.25, "q4_0": 0.25}
FLOAT32 = 0  # the type of llama.cpp's cache of keys and values


def is_installed() -> bool:
    """Whether llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


@contextmanager
def open_file(file: Path, *, context: int) -> Iterator[Any]:
    """The file in llama.cpp, with logits of all positions and a cache in float32.

    Raises: ArtifactError if llama.cpp does not open it.
    """
    import llama_cpp

    llama_cpp.llama_log_set(_make_silent_callback(), ctypes.c_void_p(0))
    try:
        llama = llama_cpp.Llama(
            str(file), n_ctx=context, logits_all=True, type_k=FLOAT32, type_v=FLOAT32, flash_attn=False, verbose=False
        )
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"llama.cpp {llama_cpp.__version__} does not open {file.name} ({error}); update llama-cpp-python, and "
            f"report this if it stays"
        ) from error
    try:
        yield llama
    finally:
        llama.close()


@functools.cache  # llama.cpp keeps a pointer to it
def _make_silent_callback() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def write_greedy(llama: Any, ids: list[int], length: int) -> tuple[list[int], Logits]:
    """`length` greedy tokens after `ids`, and the logits before each; stop tokens end nothing."""
    llama.reset()
    llama.eval(ids)
    tokens: list[int] = []
    rows = [llama.scores[llama.n_tokens - 1].copy()]
    while len(tokens) < length:
        tokens.append(int(rows[-1].argmax()))
        if len(tokens) < length:
            llama.eval([tokens[-1]])
            rows.append(llama.scores[llama.n_tokens - 1].copy())
    return tokens, np.stack(rows)


def list_token_differences(llama: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The probes of text to which llama.cpp gives other ids than the tokenizer."""
    return [text for text in PROBES if _tokenize(llama, text) != tokenizer(text, add_special_tokens=False).input_ids]


def _tokenize(llama: Any, text: str) -> Sequence[int]:
    ids: list[int] = llama.tokenize(text.encode(), add_bos=False, special=True)
    return ids
