"""Causal attention that never crosses from one document of a packed row into another.

    y_t = sum_s softmax_s(scale q_t k_s) v_s        over s <= t of t's document, and t - s < window

`dense_attention` is the definition, with a dense mask. `document_attention` is the same function with one call for each
document, so its cost is the sum of the squared lengths and not the square of the sum. H query heads share G key heads,
H a multiple of G: query head h reads key head h // (H / G). In training, `dropout` zeroes each softmax weight with that
probability and divides the others by 1 - dropout, as torch's `scaled_dot_product_attention` does.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HALF_DTYPES = (torch.bfloat16, torch.float16)
Lengths = Sequence[Sequence[int]]  # for each row, the lengths of its documents, in order; they sum to T


def document_starts(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True where a document starts: at a row's first token, at position 0, and where positions do not increase by 1."""
    is_start = position_ids == 0
    is_start[:, 0] = True
    is_start[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
    return is_start


def document_lengths(position_ids: Int[Tensor, "B T"]) -> Lengths:
    """The lengths of each row's documents, from positions that restart at 0. Synchronizes the device: once a batch."""
    size = position_ids.shape[1]
    rows = []
    for row in document_starts(position_ids).cpu():
        edges = [*row.nonzero().flatten().tolist(), size]
        rows.append(tuple(b - a for a, b in pairwise(edges)))
    return tuple(rows)


def document_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    lengths: Lengths,
    *,
    scale: float,
    window: int | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T V"]:
    """Causal attention inside each document; `lengths` comes from `document_lengths`. Equals `dense_attention`.

    A `dropout` above 0 always drops: pass 0 outside training.

    On a CPU it computes half precision (of the inputs or by autocast) in float32. In torch 2.13 (AVX-512 with bf16) a
    float32 backward takes a half to two thirds less time for documents of up to about 250 tokens. Longer documents take
    about the same time. bf16 would compile kernels of 3 MiB for every new length and keep them; float32 compiles none.
    A forward alone takes up to a quarter longer. Teacher and student use the same function, so equal models give equal
    bits.
    """
    if q.device.type == "cpu" and _is_half_precision(q, k, v):
        with torch.autocast("cpu", enabled=False):
            output = document_attention(
                q.float(), k.float(), v.float(), lengths, scale=scale, window=window, dropout=dropout
            )
        return output.to(v.dtype)
    if len(set(map(tuple, lengths))) == 1:  # rows with the same cuts (no packing, or one packed row) are one batch
        return _attend_row(q, k, v, lengths[0], scale=scale, window=window, dropout=dropout)
    rows = zip(q.split(1), k.split(1), v.split(1), lengths, strict=True)
    return torch.cat([_attend_row(*row, scale=scale, window=window, dropout=dropout) for row in rows])


def _is_half_precision(*states: Tensor) -> bool:
    """Whether the dtype of the states, or autocast, would run attention in half precision."""
    autocasts = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") in HALF_DTYPES
    return any(x.dtype in HALF_DTYPES or (autocasts and x.dtype == torch.float32) for x in states)


def dense_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    lengths: Lengths,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "B H T V"]:
    """The definition: softmax under a dense mask of the pairs of tokens that see each other. Quadratic in T."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]).to(
        q.device
    )
    mask = causal_mask(q.shape[2], q.shape[2], window=window, device=q.device)
    mask = mask & (documents[:, :, None] == documents[:, None, :])[:, None]
    scores = (scale * q @ k.mT).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def causal_mask(
    queries: int, keys: int, *, window: int | None = None, device: torch.device | None = None
) -> Bool[Tensor, "{queries} {keys}"]:
    """True at the `keys` positions that each of the last `queries` positions sees: itself and the ones before, `window`
    in all."""
    t = torch.arange(keys - queries, keys, device=device)[:, None]
    s = torch.arange(keys, device=device)[None, :]
    return (s <= t) if window is None else (s <= t) & (t - s < window)


def _attend_row(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Float[Tensor, "B H T V"]:
    # split, not slices: each slice would have a gradient as long as the row
    pieces = list(zip(*(x.split(list(lengths), dim=2) for x in (q, k, v)), strict=True))
    if len(pieces) == 1:
        return _attend_document(*pieces[0], scale=scale, window=window, dropout=dropout)
    pieces_by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        pieces_by_length.setdefault(length, []).append(i)
    outputs: dict[int, Tensor] = {}
    for indices in pieces_by_length.values():  # documents of equal length are one batch
        batch = (torch.cat(tensors) for tensors in zip(*(pieces[i] for i in indices), strict=True))
        output = _attend_document(*batch, scale=scale, window=window, dropout=dropout).split(len(q))
        outputs |= zip(indices, output, strict=True)
    return torch.cat([outputs[i] for i in range(len(pieces))], dim=2)


def _attend_document(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Float[Tensor, "B H T V"]:
    size, enable_gqa = q.shape[2], q.shape[1] != k.shape[1]
    if window is None or size <= window:
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout
        )
    mask = causal_mask(size, size, window=window, device=q.device)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout)
