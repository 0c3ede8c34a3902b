"""Distributions as bytes: what a teacher's cache holds for each row, about two bytes a token kept.

A window is one record. Its N rows have tokens i_1 < ... < i_k each, the likeliest of them i*, and rest r of the mass:

| part | type | content |
|---|---|---|
| `counts` | uint16 `[N]` | k |
| `tails` | float32 `[N]` | r, exact |
| `widths` | float16 `[N]` | w = log p[i*] - min_j log p[i_j] |
| `codes` | uint8 `[sum k]` | round(255 sqrt((log p[i*] - log p[i_j]) / w)): the steps are finest where the mass is |
| `classes` | uint8 `[N C]` | class c has min(254, round(5 log(r / r_c))), and 255 stands for nothing |
| `places` | uint16 `[sum k]` | where the row's ids stand among the window's names, from one to the next |
| `names` | uint16 `[U]` | the ids that occur in the window, ascending, from one to the next |

Rows of a window share most of their tokens, so that a place takes a byte where an id takes two. Parts lie end to end as
planes of their bytes, lowest first, each plane deflated as a block of its own. Where the vocabulary has 65,536 ids or
more, uint16 is uint32. Decoded, the tokens' probabilities are scaled to 1 - r in all and the classes' masses to r, so
the codes need to hold ratios alone. `exact` keeps, in place of widths, codes and classes, `log_p` float32 `[sum k]` and
`log_rest` float32 `[N C]`, both as they are.
"""

import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from potstill.ops.coarse import Coarse

LEVELS = 255
CLASS_STEP = 0.2  # nats
NARROW = 2**16  # a vocabulary below it takes two bytes
FULL = 1 - 2**-24  # the largest float32 below 1: a rest of all the mass is a rounding


class Format(NamedTuple):
    """What must be known to read codes: vocabulary, classes, whether logarithms are kept whole."""

    vocabulary: int
    classes: int
    exact: bool

    @property
    def integer(self) -> np.dtype:
        """The type of counts, places and names."""
        return np.dtype("<u2" if self.vocabulary < NARROW else "<u4")


def encode(rows: Coarse, how: Format) -> dict[str, np.ndarray]:
    """`record`, of one document or window of one; with `exact` also `log_p` and `log_rest`."""
    log_p, order = _ascending(rows)
    known = ~log_p.isneginf()
    counts, tails = known.sum(-1).numpy(), rows.log_rest.exp().sum(-1)
    ids = rows.ids.gather(-1, order)[known].numpy()
    occurs = np.zeros(how.vocabulary, bool)
    occurs[ids] = True
    names, places = np.flatnonzero(occurs), (occurs.cumsum() - 1)[ids]
    first = (counts.cumsum() - counts)[counts > 0]
    steps = np.diff(places, prepend=0)
    steps[first] = places[first]
    parts = [counts.astype(how.integer), tails.numpy().astype("<f4")]
    if not how.exact:
        parts += [*_ratios(log_p, known), _class_codes(rows.log_rest, tails)]
    record = _deflated([*parts, steps.astype(how.integer), np.diff(names, prepend=0).astype(how.integer)])
    plain = {"log_p": log_p[known].numpy(), "log_rest": rows.log_rest.numpy().ravel()} if how.exact else {}
    return {"record": np.frombuffer(record, np.uint8), **plain}


def decode(arrays: Mapping[str, np.ndarray], rows: int, members: Tensor, how: Format) -> Coarse:
    """The `rows` again, in float32; the ids of a row ascend."""
    record = _Record(arrays["record"])
    counts = torch.from_numpy(record.take(how.integer, rows).astype(np.int64))
    tails = torch.from_numpy(record.take("<f4", rows))
    ids = int(counts.sum())
    known = torch.arange(int(counts.max()) if rows else 1) < counts[:, None]
    if how.exact:
        log_p = _laid(arrays["log_p"], known).masked_fill(~known, -torch.inf)
        log_rest = torch.from_numpy(arrays["log_rest"].reshape(rows, how.classes))
    else:
        widths = torch.from_numpy(record.take("<f2", rows)).float()
        below = (_laid(record.take("u1", ids), known).float() / LEVELS).square() * widths[:, None]
        named = torch.log1p(-tails.clamp_max(FULL))
        log_p = torch.log_softmax(-below.masked_fill(~known, torch.inf), -1) + named[:, None]
        codes = torch.from_numpy(record.take("u1", rows * how.classes)).float().reshape(rows, how.classes)
        share = torch.where(codes == LEVELS, -torch.inf, -CLASS_STEP * codes)
        nothing = share.isneginf().all(-1, keepdim=True)
        log_rest = torch.where(nothing, 0.0, share).log_softmax(-1) + tails.log()[:, None]
    places = _laid(record.take(how.integer, ids).astype(np.int64), known).cumsum(-1)  # past its end a row's last id
    names = torch.from_numpy(record.take(how.integer).cumsum(dtype=np.int64))
    return Coarse(names[places], log_p, log_rest, members)


def _ascending(rows: Coarse) -> tuple[Tensor, Tensor]:
    """log p by ascending ids, where there is no token last; and the order."""
    order = rows.ids.masked_fill(rows.log_p.isneginf(), torch.iinfo(torch.long).max).argsort(-1)
    return rows.log_p.gather(-1, order), order


def _ratios(log_p: Tensor, known: Tensor) -> list[np.ndarray]:
    """The widths and codes of rows."""
    below = (log_p.amax(-1, keepdim=True) - log_p).masked_fill(~known, 0.0)
    widths = below.amax(-1).clamp_max(torch.finfo(torch.half).max).half()
    codes = (LEVELS * (below / widths.float().clamp_min(1e-7)[:, None]).sqrt()).round().clamp(0, LEVELS)
    return [widths.numpy(), codes[known].to(torch.uint8).numpy()]


def _class_codes(log_rest: Tensor, tails: Tensor) -> np.ndarray:
    gaps = ((tails.log()[:, None] - log_rest) / CLASS_STEP).round().clamp(0, LEVELS - 1)
    codes = torch.where(log_rest.isneginf(), LEVELS, gaps)  # a class that holds a little is not one of nothing
    return codes.to(torch.uint8).numpy().ravel()


def _deflated(parts: Iterable[np.ndarray]) -> bytes:
    """The planes of bytes of all parts as one stream, a block for each."""
    stream = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    planes = (plane for part in parts for plane in part.reshape(-1, 1).view(np.uint8).T)
    return b"".join(stream.compress(one.tobytes()) + stream.flush(zlib.Z_FULL_FLUSH) for one in planes) + stream.flush()


class _Record:
    """The parts of a record, one after the other."""

    def __init__(self, deflated: np.ndarray) -> None:
        self._left = np.frombuffer(bytearray(zlib.decompress(deflated.tobytes())), np.uint8)

    def take(self, kind: str | np.dtype, count: int | None = None) -> np.ndarray:
        """The next `count` numbers, or all that are left."""
        width = np.dtype(kind).itemsize
        end = len(self._left) if count is None else width * count
        planes, self._left = self._left[:end].reshape(width, -1), self._left[end:]
        return np.ascontiguousarray(planes.T).view(kind).ravel()


def _laid(flat: np.ndarray, known: Tensor) -> Tensor:
    """Ragged rows side by side, 0 where a row has ended."""
    values = torch.from_numpy(np.ascontiguousarray(flat))
    return values.new_zeros(known.shape).masked_scatter_(known, values)
