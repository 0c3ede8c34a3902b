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

from potstill.ops.coarse import CoarseDistribution

LEVELS = 255
CLASS_STEP = 0.2  # nats
SMALL_VOCABULARY = 2**16  # a vocabulary below it takes two bytes
MAX_TAIL = 1 - 2**-24  # the largest float32 below 1: a rest of all the mass is a rounding


class CodecFormat(NamedTuple):
    """What must be known to read codes: vocabulary, classes, whether logarithms are kept whole."""

    vocabulary: int
    classes: int
    exact: bool

    @property
    def int_dtype(self) -> np.dtype:
        """The type of counts, places and names."""
        return np.dtype("<u2" if self.vocabulary < SMALL_VOCABULARY else "<u4")


def encode(rows: CoarseDistribution, codec: CodecFormat) -> dict[str, np.ndarray]:
    """`record`, of one document or window of one; with `exact` also `log_p` and `log_rest`."""
    log_p, order = _sort_by_id(rows)
    mask = ~log_p.isneginf()
    counts, tails = mask.sum(-1).numpy(), rows.log_rest.exp().sum(-1)
    ids = rows.ids.gather(-1, order)[mask].numpy()
    is_used = np.zeros(codec.vocabulary, bool)
    is_used[ids] = True
    names, places = np.flatnonzero(is_used), (is_used.cumsum() - 1)[ids]
    row_starts = (counts.cumsum() - counts)[counts > 0]
    steps = np.diff(places, prepend=0)
    steps[row_starts] = places[row_starts]
    parts = [counts.astype(codec.int_dtype), tails.numpy().astype("<f4")]
    if not codec.exact:
        parts += [*_encode_ratios(log_p, mask), _encode_classes(rows.log_rest, tails)]
    record = _deflate([*parts, steps.astype(codec.int_dtype), np.diff(names, prepend=0).astype(codec.int_dtype)])
    logarithms = {"log_p": log_p[mask].numpy(), "log_rest": rows.log_rest.numpy().ravel()} if codec.exact else {}
    return {"record": np.frombuffer(record, np.uint8), **logarithms}


def decode(arrays: Mapping[str, np.ndarray], rows: int, members: Tensor, codec: CodecFormat) -> CoarseDistribution:
    """The `rows` again, in float32; the ids of a row ascend."""
    record = _RecordReader(arrays["record"])
    counts = torch.from_numpy(record.take(codec.int_dtype, rows).astype(np.int64))
    tails = torch.from_numpy(record.take("<f4", rows))
    num_ids = int(counts.sum())
    mask = torch.arange(int(counts.max()) if rows else 1) < counts[:, None]
    if codec.exact:
        log_p = _pad_rows(arrays["log_p"], mask).masked_fill(~mask, -torch.inf)
        log_rest = torch.from_numpy(arrays["log_rest"].reshape(rows, codec.classes))
    else:
        widths = torch.from_numpy(record.take("<f2", rows)).float()
        gaps = (_pad_rows(record.take("u1", num_ids), mask).float() / LEVELS).square() * widths[:, None]
        log_top_mass = torch.log1p(-tails.clamp_max(MAX_TAIL))
        log_p = torch.log_softmax(-gaps.masked_fill(~mask, torch.inf), -1) + log_top_mass[:, None]
        codes = torch.from_numpy(record.take("u1", rows * codec.classes)).float().reshape(rows, codec.classes)
        log_share = torch.where(codes == LEVELS, -torch.inf, -CLASS_STEP * codes)
        is_empty = log_share.isneginf().all(-1, keepdim=True)
        log_rest = torch.where(is_empty, 0.0, log_share).log_softmax(-1) + tails.log()[:, None]
    places = _pad_rows(record.take(codec.int_dtype, num_ids).astype(np.int64), mask).cumsum(
        -1
    )  # past its end a row's last id
    names = torch.from_numpy(record.take(codec.int_dtype).cumsum(dtype=np.int64))
    return CoarseDistribution(names[places], log_p, log_rest, members)


def _sort_by_id(rows: CoarseDistribution) -> tuple[Tensor, Tensor]:
    """log p by ascending ids, where there is no token last; and the order."""
    order = rows.ids.masked_fill(rows.log_p.isneginf(), torch.iinfo(torch.long).max).argsort(-1)
    return rows.log_p.gather(-1, order), order


def _encode_ratios(log_p: Tensor, mask: Tensor) -> list[np.ndarray]:
    """The widths and codes of rows."""
    gaps = (log_p.amax(-1, keepdim=True) - log_p).masked_fill(~mask, 0.0)
    widths = gaps.amax(-1).clamp_max(torch.finfo(torch.half).max).half()
    codes = (LEVELS * (gaps / widths.float().clamp_min(1e-7)[:, None]).sqrt()).round().clamp(0, LEVELS)
    return [widths.numpy(), codes[mask].to(torch.uint8).numpy()]


def _encode_classes(log_rest: Tensor, tails: Tensor) -> np.ndarray:
    gaps = ((tails.log()[:, None] - log_rest) / CLASS_STEP).round().clamp(0, LEVELS - 1)
    codes = torch.where(log_rest.isneginf(), LEVELS, gaps)  # a class that holds a little is not one of nothing
    return codes.to(torch.uint8).numpy().ravel()


def _deflate(parts: Iterable[np.ndarray]) -> bytes:
    """The planes of bytes of all parts as one stream, a block for each."""
    stream = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    planes = (plane for part in parts for plane in part.reshape(-1, 1).view(np.uint8).T)
    return (
        b"".join(stream.compress(block.tobytes()) + stream.flush(zlib.Z_FULL_FLUSH) for block in planes)
        + stream.flush()
    )


class _RecordReader:
    """The parts of a record, one after the other."""

    def __init__(self, record: np.ndarray) -> None:
        self._remaining = np.frombuffer(bytearray(zlib.decompress(record.tobytes())), np.uint8)

    def take(self, dtype: str | np.dtype, count: int | None = None) -> np.ndarray:
        """The next `count` numbers, or all that are left."""
        width = np.dtype(dtype).itemsize
        num_bytes = len(self._remaining) if count is None else width * count
        planes, self._remaining = self._remaining[:num_bytes].reshape(width, -1), self._remaining[num_bytes:]
        return np.ascontiguousarray(planes.T).view(dtype).ravel()


def _pad_rows(flat: np.ndarray, mask: Tensor) -> Tensor:
    """Ragged rows side by side, 0 where a row has ended."""
    values = torch.from_numpy(np.ascontiguousarray(flat))
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)
