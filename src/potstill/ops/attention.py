"""Causal attention that never crosses from one document of a packed row into another.

    y_t = sum_s softmax_s(scale q_t k_s) v_s        over s <= t of t's document, and p_t - p_s < window

The position p_t is t, or that of `position_ids` where tokens of a document are missing.

`dense_attention` is the definition, with a dense mask. `document_attention` is the same function with one call for each
document, so its cost is the sum of the squared lengths and not the square of the sum. Under a window it makes one call
for each chunk of a document, so cost and memory are linear in the length. H query heads share G key heads, H a multiple
of G: query head h reads key head h // (H / G). In training, `dropout` zeroes each softmax weight with that probability
and divides the others by 1 - dropout, as torch's `scaled_dot_product_attention` does.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

HALF_DTYPES = (torch.bfloat16, torch.float16)
MIN_CHUNK = 128  # queries per call under a window
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
    position_ids: Int[Tensor, "B T"] | None = None,
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
                *(q.float(), k.float(), v.float(), lengths),
                scale=scale,
                window=window,
                dropout=dropout,
                position_ids=position_ids,
            )
        return output.to(v.dtype)
    attend = partial(_attend_row, scale=scale, window=window, dropout=dropout)
    places = None if window is None else position_ids
    if len(set(map(tuple, lengths))) == 1:  # rows with the same cuts (no packing, or one packed row) are one batch
        return attend(q, k, v, lengths[0], places)
    row_places = [None] * len(q) if places is None else places.split(1)
    rows = zip(q.split(1), k.split(1), v.split(1), lengths, row_places, strict=True)
    return torch.cat([attend(*row) for row in rows])


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
    position_ids: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """The definition: softmax under a dense mask of the pairs of tokens that see each other. Quadratic in T."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]).to(
        q.device
    )
    mask = causal_mask(q.shape[2], q.shape[2], device=q.device)
    mask = mask & (documents[:, :, None] == documents[:, None, :])[:, None]
    if window is not None:
        places = torch.arange(q.shape[2], device=q.device)[None] if position_ids is None else position_ids
        mask = mask & is_within_window(places, places, window)
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


def is_within_window(queries: Int[Tensor, "B T"], keys: Int[Tensor, "B S"], window: int) -> Bool[Tensor, "B 1 T S"]:
    """True for the keys whose position is less than `window` before that of the query."""
    return (queries[:, :, None] - keys[:, None, :] < window)[:, None]


def _attend_row(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    lengths: Sequence[int],
    position_ids: Int[Tensor, "B T"] | None,
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Float[Tensor, "B H T V"]:
    # split, not slices: each slice would have a gradient as long as the row
    pieces = list(zip(*(x.split(list(lengths), dim=2) for x in (q, k, v)), strict=True))
    attend = partial(_attend_document, scale=scale, window=window, dropout=dropout)
    places = None if position_ids is None else position_ids.split(list(lengths), dim=1)
    if len(pieces) == 1:
        return attend(*pieces[0], position_ids=position_ids)
    pieces_by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        pieces_by_length.setdefault(length, []).append(i)
    outputs: dict[int, Tensor] = {}
    for indices in pieces_by_length.values():  # documents of equal length are one batch
        batch = (torch.cat(tensors) for tensors in zip(*(pieces[i] for i in indices), strict=True))
        batch_places = None if places is None else torch.cat([places[i] for i in indices])
        output = attend(*batch, position_ids=batch_places).split(len(q))
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
    position_ids: Int[Tensor, "B T"] | None,
) -> Float[Tensor, "B H T V"]:
    mix = partial(scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1], dropout_p=dropout)
    length = q.shape[2]
    span = length if position_ids is None else int((position_ids[:, -1] - position_ids[:, 0]).max()) + 1
    if window is None or span <= window:
        return mix(q, k, v, is_causal=True)
    size = max(window, MIN_CHUNK)  # so a chunk sees no chunk but the one before it, and no mask is as long as the text
    q_chunks, k_chunks, v_chunks = (x.split(size, dim=2) for x in (q, k, v))
    places = torch.arange(length, device=q.device)[None] if position_ids is None else position_ids
    place_chunks, outputs = places.split(size, dim=1), []
    for i, q_chunk in enumerate(q_chunks):
        past = slice(max(0, i - 1), i + 1)
        keys, values = torch.cat(k_chunks[past], 2), torch.cat(v_chunks[past], 2)
        mask = causal_mask(q_chunk.shape[2], keys.shape[2], device=q.device)
        mask = mask & is_within_window(place_chunks[i], torch.cat(place_chunks[past], 1), window)
        outputs.append(mix(q_chunk, keys, values, attn_mask=mask))
    return torch.cat(outputs, dim=2)
