"""Causal attention that never crosses from one document of a packed row into another.

    y_t = sum_s softmax_s(scale q_t k_s) v_s        over s <= t of t's document, and p_t - p_s < window

A continuation is a document whose first position is p > 0. Its sum also runs over the first p tokens of the last
document of the row that began at 0, its prompt. The position p_t is the number of tokens before t, those of the prompt
included, or that of `position_ids` where tokens of a document are missing.

`dense_attention` is the definition, with a dense mask. `document_attention` is the same function with one call for each
document, so its cost is the sum of the squared lengths and not the square of the sum. A continuation of n tokens costs
n (p + n). Under a window there is one call for each chunk of a document, so cost and memory are linear in the length. H
query heads share G key heads, H a multiple of G: query head h reads key head h // (H / G). In training, `dropout`
zeroes each softmax weight with that probability and divides the others by 1 - dropout, as torch's
`scaled_dot_product_attention` does.

By positions alone, a continuation right after its prompt is one document with it. It sees the same tokens.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

HALF_DTYPES = (torch.bfloat16, torch.float16)
MIN_CHUNK = 128  # queries per call under a window
MAX_MASK_SIZE = 2**20  # entries of a continuation's mask; above it, the queries are padded instead


class Prefix(NamedTuple):
    """The first `size` tokens of the document with the number `document` in its row, which a continuation sees."""

    document: int = 0
    size: int = 0


Lengths = Sequence[Sequence[int]]  # for each row, the lengths of its documents, in order; they sum to T
Prefixes = Sequence[Sequence[Prefix]]  # for each row, the prefix of each document, of size 0 where it has none


def document_starts(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True where a document starts: at a row's first token, at position 0, and where positions do not increase by 1."""
    is_start = position_ids == 0
    is_start[:, 0] = True
    is_start[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
    return is_start


def continuation_starts(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True where a continuation starts that does not follow its prompt directly."""
    is_start = document_starts(position_ids)
    has_prompt = (is_start & (position_ids == 0)).cumsum(1) > 0
    return is_start & (position_ids > 0) & has_prompt


def document_lengths(position_ids: Int[Tensor, "B T"]) -> Lengths:
    """The lengths of each row's documents, from positions that restart at 0. Synchronizes the device: once a batch."""
    size = position_ids.shape[1]
    rows = []
    for row in document_starts(position_ids).cpu():
        edges = [*row.nonzero().flatten().tolist(), size]
        rows.append(tuple(b - a for a, b in pairwise(edges)))
    return tuple(rows)


def document_prefixes(position_ids: Int[Tensor, "B T"], lengths: Lengths) -> Prefixes | None:
    """The prefix of each document of these lengths, or None if no row has a continuation. Synchronizes the device."""
    rows = []
    for ids, row in zip(position_ids.cpu(), lengths, strict=True):
        prompt, prefixes = None, []
        for number, first in enumerate(ids[[0, *accumulate(row[:-1])]].tolist()):
            prompt = number if first == 0 else prompt
            prefixes.append(Prefix() if first == 0 or prompt is None else Prefix(prompt, min(first, row[prompt])))
        rows.append(tuple(prefixes))
    return tuple(rows) if any(prefix.size for row in rows for prefix in row) else None


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
    prefixes: Prefixes | None = None,
) -> Float[Tensor, "B H T V"]:
    """Causal attention inside each document, and from each continuation to its prompt. Equals `dense_attention`.

    `lengths` comes from `document_lengths`, and `prefixes` from `document_prefixes`. A `dropout` above 0 always drops:
    pass 0 outside training.

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
                prefixes=prefixes,
            )
        return output.to(v.dtype)
    attend = partial(_attend_row, scale=scale, window=window, dropout=dropout)
    places = None if window is None else position_ids
    row_prefixes = [None] * len(q) if prefixes is None else list(map(tuple, prefixes))
    if len(set(zip(map(tuple, lengths), row_prefixes, strict=True))) == 1:  # no packing, or one packed row: one batch
        return attend(q, k, v, lengths[0], row_prefixes[0], places)
    row_places = [None] * len(q) if places is None else places.split(1)
    rows = zip(q.split(1), k.split(1), v.split(1), lengths, row_prefixes, row_places, strict=True)
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
    prefixes: Prefixes | None = None,
) -> Float[Tensor, "B H T V"]:
    """The definition: softmax under a dense mask of the pairs of tokens that see each other. Quadratic in T."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    rows = [[Prefix()] * len(row) for row in lengths] if prefixes is None else prefixes
    masks, places = zip(*(_see_documents(*row) for row in zip(lengths, rows, strict=True)), strict=True)
    mask = torch.stack(masks)[:, None].to(q.device)
    if window is not None:
        ids = torch.stack(places).to(q.device) if position_ids is None else position_ids
        mask = mask & is_within_window(ids, ids, window)
    scores = (scale * q @ k.mT).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def _see_documents(lengths: Sequence[int], prefixes: Sequence[Prefix]) -> tuple[Bool[Tensor, "T T"], Int[Tensor, " T"]]:
    """(which token sees which, the number of tokens before each) in a row."""
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    starts = torch.tensor([0, *accumulate(lengths[:-1])])[documents]
    within = torch.arange(len(documents)) - starts
    prompts, sizes = torch.tensor(prefixes)[documents].T
    is_own = documents[:, None] == documents
    is_prompt = (prompts[:, None] == documents) & (within < sizes[:, None])
    return is_own & (within <= within[:, None]) | is_prompt, within + sizes


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
    prefixes: Sequence[Prefix] | None,
    position_ids: Int[Tensor, "B T"] | None,
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Float[Tensor, "B H T V"]:
    attend = partial(_attend_document, scale=scale, window=window, dropout=dropout)
    # split, not slices: each slice would have a gradient as long as the row
    queries, keys, values = (x.split(list(lengths), dim=2) for x in (q, k, v))
    if len(lengths) == 1:
        return attend(queries[0], keys[0], values[0], position_ids=position_ids)
    places = None if position_ids is None else position_ids.split(list(lengths), dim=1)
    pieces_by_shape: dict[tuple[int, int], list[int]] = {}
    for i, length in enumerate(lengths):
        pieces_by_shape.setdefault((length, prefixes[i].size if prefixes else 0), []).append(i)
    outputs: dict[int, Tensor] = {}
    for (_, size), indices in pieces_by_shape.items():  # documents of equal length are one batch
        prompts = [prefixes[i].document for i in indices] if prefixes and size else []
        output = attend(
            torch.cat([queries[i] for i in indices]),
            _join_prompts(keys, indices, prompts, size, dim=2),
            _join_prompts(values, indices, prompts, size, dim=2),
            position_ids=None if places is None else _join_prompts(places, indices, prompts, size, dim=1),
        )
        outputs |= zip(indices, output.split(len(q)), strict=True)
    return torch.cat([outputs[i] for i in range(len(lengths))], dim=2)


def _join_prompts(
    pieces: Sequence[Tensor], indices: Sequence[int], prompts: Sequence[int], size: int, *, dim: int
) -> Tensor:
    """The pieces at `indices` as one batch, each after the first `size` tokens of its prompt, if there are prompts."""
    batch = torch.cat([pieces[i] for i in indices])
    if not prompts:
        return batch
    return torch.cat([torch.cat([pieces[i].narrow(dim, 0, size) for i in prompts]), batch], dim)


def _attend_document(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S V"],
    *,
    scale: float,
    window: int | None,
    dropout: float,
    position_ids: Int[Tensor, "B S"] | None,
) -> Float[Tensor, "B H T V"]:
    """Causal attention of the last T of S tokens, which lie at `position_ids`."""
    mix = partial(scaled_dot_product_attention, scale=scale, enable_gqa=q.shape[1] != k.shape[1], dropout_p=dropout)
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    span = past + length if position_ids is None else int((position_ids[:, -1] - position_ids[:, 0]).max()) + 1
    if window is None or span <= window:
        if past == 0:
            return mix(q, k, v, is_causal=True)
        if length * (past + length) <= MAX_MASK_SIZE:
            return mix(q, k, v, attn_mask=causal_mask(length, past + length, device=q.device))
        return mix(pad(q, (0, 0, past, 0)), k, v, is_causal=True)[:, :, past:]
    size = max(window, MIN_CHUNK)  # so a chunk sees no chunk but the one before it, and no mask is as long as the text
    sizes = [min(size, length - start) for start in range(0, length, size)]
    lead = min(past, size)  # the end of the prompt, the chunk before the first one
    parts = [past - lead, lead, *sizes]
    places = torch.arange(past + length, device=q.device)[None] if position_ids is None else position_ids
    k_chunks, v_chunks = (x.split(parts, dim=2)[1:] for x in (k, v))
    place_chunks, outputs = places.split(parts, dim=1)[1:], []
    for i, q_chunk in enumerate(q.split(sizes, dim=2)):
        keys, values, key_places = (
            torch.cat(chunks[i : i + 2], dim) for chunks, dim in ((k_chunks, 2), (v_chunks, 2), (place_chunks, 1))
        )
        mask = causal_mask(q_chunk.shape[2], keys.shape[2], device=q.device)
        mask = mask & is_within_window(place_chunks[i + 1], key_places, window)
        outputs.append(mix(q_chunk, keys, values, attn_mask=mask))
    return torch.cat(outputs, dim=2)
