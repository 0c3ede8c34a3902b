"""Encodes the distributions of a teacher's cache, in about two bytes per stored token.

A window is one record of N rows. A row stores tokens i_1 < ... < i_k; i* is the likeliest, r the mass of all others:

| part | type | content |
|---|---|---|
| `counts` | uint16 `[N]` | k |
| `tails` | float32 `[N]` | r, exact |
| `widths` | float16 `[N]` | w = log p[i*] - min_j log p[i_j] |
| `codes` | uint8 `[sum k]` | round(255 sqrt((log p[i*] - log p[i_j]) / w)): finest where the mass is |
| `classes` | uint8 `[N C]` | min(254, round(5 log(r / r_c))) for class c of mass r_c; 255 for no mass |
| `places` | uint16 `[sum k]` | indices of the row's ids in `names`, as differences |
| `names` | uint16 `[U]` | the ids that occur in the window, ascending, as differences |

The rows of a window share most of their tokens, so an index takes one byte where an id takes two. The parts are stored
end to end as planes of their bytes, lowest first; each plane is deflated as its own block. For a vocabulary of 65,536
ids or more, uint16 becomes uint32. The decoder scales the tokens' probabilities to the sum 1 - r and the classes'
masses to r, so codes hold ratios only. With `exact`, `log_p` float32 `[sum k]` and `log_rest` float32 `[N C]` replace
widths, codes and classes.
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
SMALL_VOCABULARY = 2**16  # below it, an id takes two bytes
MAX_TAIL = 1 - 2**-24  # the largest float32 below 1; a tail of 1 comes from rounding


class CodecFormat(NamedTuple):
    """What the decoder must know: the sizes of vocabulary and classes, and whether log-probabilities are exact."""

    vocabulary: int
    classes: int
    exact: bool

    @property
    def int_dtype(self) -> np.dtype:
        """The type of `counts`, `places` and `names`."""
        return np.dtype("<u2" if self.vocabulary < SMALL_VOCABULARY else "<u4")


def encode(rows: CoarseDistribution, codec: CodecFormat) -> dict[str, np.ndarray]:
    """Encodes the rows of one window as `record`; with `exact` also `log_p` and `log_rest`."""
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
    """Decodes `rows` rows, in float32. The ids of a row ascend."""
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
    )  # after its end, the row's last id
    names = torch.from_numpy(record.take(codec.int_dtype).cumsum(dtype=np.int64))
    return CoarseDistribution(names[places], log_p, log_rest, members)


def _sort_by_id(rows: CoarseDistribution) -> tuple[Tensor, Tensor]:
    """log p in ascending order of ids, with unused places last, and the order itself."""
    order = rows.ids.masked_fill(rows.log_p.isneginf(), torch.iinfo(torch.long).max).argsort(-1)
    return rows.log_p.gather(-1, order), order


def _encode_ratios(log_p: Tensor, mask: Tensor) -> list[np.ndarray]:
    """The parts `widths` and `codes`."""
    gaps = (log_p.amax(-1, keepdim=True) - log_p).masked_fill(~mask, 0.0)
    widths = gaps.amax(-1).clamp_max(torch.finfo(torch.half).max).half()
    codes = (LEVELS * (gaps / widths.float().clamp_min(1e-7)[:, None]).sqrt()).round().clamp(0, LEVELS)
    return [widths.numpy(), codes[mask].to(torch.uint8).numpy()]


def _encode_classes(log_rest: Tensor, tails: Tensor) -> np.ndarray:
    gaps = ((tails.log()[:, None] - log_rest) / CLASS_STEP).round().clamp(0, LEVELS - 1)
    codes = torch.where(log_rest.isneginf(), LEVELS, gaps)  # 255 is reserved for a class without mass
    return codes.to(torch.uint8).numpy().ravel()


def _deflate(parts: Iterable[np.ndarray]) -> bytes:
    """Deflates the byte planes of all parts as one stream, each plane as a block."""
    stream = zlib.compressobj(9, strategy=zlib.Z_FILTERED)
    planes = (plane for part in parts for plane in part.reshape(-1, 1).view(np.uint8).T)
    return (
        b"".join(stream.compress(block.tobytes()) + stream.flush(zlib.Z_FULL_FLUSH) for block in planes)
        + stream.flush()
    )


class _RecordReader:
    """Reads the parts of a record in order."""

    def __init__(self, record: np.ndarray) -> None:
        self._remaining = np.frombuffer(bytearray(zlib.decompress(record.tobytes())), np.uint8)

    def take(self, dtype: str | np.dtype, count: int | None = None) -> np.ndarray:
        """The next `count` numbers, or all that remain."""
        width = np.dtype(dtype).itemsize
        num_bytes = len(self._remaining) if count is None else width * count
        planes, self._remaining = self._remaining[:num_bytes].reshape(width, -1), self._remaining[num_bytes:]
        return np.ascontiguousarray(planes.T).view(dtype).ravel()


def _pad_rows(flat: np.ndarray, mask: Tensor) -> Tensor:
    """Ragged rows as a matrix, padded with 0."""
    values = torch.from_numpy(np.ascontiguousarray(flat))
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)
