"""Distributions as bytes: what a teacher's cache holds for each row, about 2.6 bytes a token kept.

A row with tokens i_1 ... i_k (the likeliest first) and rest r of the mass:

| array | type | content |
|---|---|---|
| `counts` | uint8, or uint32 where k may be above 255, `[N]` | k |
| `ids` | uint16, or uint32 for a vocabulary above 65,536, `[sum k]` | i_1 ... i_k |
| `steps` | float16 `[N]` | (log p[i_1] - log p[i_k]) / 255 |
| `tails` | float32 `[N]` | r, exact |
| `codes` | uint8, deflated | first differences of round((log p[i_1] - log p[i_j]) / step); then the classes' codes |

Class c has code min(254, round(10 log(r / r_c))), and 255 stands for nothing. Decoded, the tokens' probabilities are
scaled to 1 - r in all and the classes' masses to r, so the codes need to hold ratios alone. `exact` keeps log p and
log r_c as float32 instead of codes.
"""

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.ops.coarse import Coarse

LEVELS = 255
CLASS_STEP = 0.1  # nats
NARROW = 2**16  # ids below it take two bytes


class Format(NamedTuple):
    """What must be known to read codes: vocabulary, classes, whether logarithms are kept whole."""

    vocabulary: int
    classes: int
    exact: bool


def encode(rows: Coarse, how: Format) -> dict[str, np.ndarray]:
    """The arrays of `rows`, one document or window of one."""
    known = ~rows.log_p.isneginf()
    counts = known.sum(-1)
    tails = rows.log_rest.exp().sum(-1)
    found = {
        "counts": counts.numpy().astype(np.uint8 if rows.ids.shape[1] < 256 else np.uint32),
        "ids": rows.ids[known].numpy().astype(np.uint16 if how.vocabulary <= NARROW else np.uint32),
        "tails": tails.numpy().astype(np.float32),
    }
    if how.exact:
        log_p = rows.log_p[known].numpy().astype(np.float32)
        return {**found, "log_p": log_p, "log_rest": rows.log_rest.numpy().astype(np.float32).ravel()}
    below = rows.log_p[:, :1] - rows.log_p
    widest = below.masked_fill(~known, 0.0).amax(-1)
    steps = (widest / LEVELS).half()
    codes = (below / steps.float().clamp_min(1e-7)[:, None]).round().clamp(0, LEVELS)
    flat = codes.masked_fill(~known, 0.0).to(torch.uint8).numpy()
    differences = np.diff(flat, axis=1, prepend=np.uint8(0))[known.numpy()]
    gaps = ((tails.log()[:, None] - rows.log_rest) / CLASS_STEP).round().clamp(0, LEVELS - 1)
    classes = torch.where(rows.log_rest.isneginf(), LEVELS, gaps)  # a class that holds a little is not one of nothing
    blob = zlib.compress(differences.tobytes() + classes.to(torch.uint8).numpy().tobytes(), 6)
    return {**found, "steps": steps.numpy(), "codes": np.frombuffer(blob, np.uint8)}


def decode(arrays: Mapping[str, np.ndarray], members: Tensor, how: Format) -> Coarse:
    """The rows again, in float32."""
    counts = torch.from_numpy(arrays["counts"].astype(np.int64))
    width = int(counts.max()) if len(counts) else 1
    known = torch.arange(width) < counts[:, None]
    ids = _laid(arrays["ids"].astype(np.int64), known)
    tails = torch.from_numpy(arrays["tails"])
    if how.exact:
        log_p = _laid(arrays["log_p"], known)
        rest = torch.from_numpy(arrays["log_rest"].reshape(len(counts), how.classes))
        return Coarse(_filled(ids, known), log_p.masked_fill(~known, -torch.inf), rest, members)
    blob = np.frombuffer(bytearray(zlib.decompress(arrays["codes"].tobytes())), np.uint8)
    entries = len(arrays["ids"])
    codes = _laid(blob[:entries], known).cumsum(-1, dtype=torch.int64) % (LEVELS + 1)
    below = codes * torch.from_numpy(arrays["steps"].astype(np.float32))[:, None]
    log_p = torch.log_softmax(-below.masked_fill(~known, torch.inf), -1) + torch.log1p(-tails)[:, None]
    classes = torch.from_numpy(blob[entries:].reshape(len(counts), how.classes).astype(np.float32))
    share = torch.where(classes == LEVELS, -torch.inf, -CLASS_STEP * classes)
    nothing = share.isneginf().all(-1, keepdim=True)
    share = torch.where(nothing, 0.0, share).log_softmax(-1)
    return Coarse(_filled(ids, known), log_p, share + tails.log()[:, None], members)


def _laid(flat: np.ndarray, known: Tensor) -> Tensor:
    """Ragged rows side by side, 0 where a row has ended."""
    values = torch.from_numpy(np.ascontiguousarray(flat))
    return values.new_zeros(known.shape).masked_scatter_(known, values)


def _filled(ids: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, ids, ids[:, :1])
