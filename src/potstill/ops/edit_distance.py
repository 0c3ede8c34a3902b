"""Minimum edit distance between strings, and between two sequences of strings (MinED).

    d(a, b)   least number of bytes inserted, deleted or replaced that makes b of a
    D[i, j] = d(a_i, b_j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1])

d is the Levenshtein distance (doi:10.1145/321796.321811). D is dynamic time warping over tokens: FuseLLM
(arXiv:2401.10491) and DSKD's baseline pair two tokenizations with it, without the offsets of the tokens in the text.
The path is traced from its end. At a tie, both sides step back, else the first, else the second. The released code has
the teacher first and the student second; another order gives another alignment.

`edit_distances` computes d for many pairs of strings at once. A running minimum computes D along a row, because a step
along the row only adds: min over k <= j of (E[k] + S[j] - S[k]) = S[j] + cummin(E - S)[j].

Departs from the paper: distances are over bytes and not over characters, so that half a character has one too.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int16, Int64
from torch import Tensor

BLOCK = 256  # distinct strings of each side that are compared at once
BOTH, FIRST, SECOND = range(3)  # the sides that step back


def edit_distances(first: Int16[Tensor, "A *N"], second: Int16[Tensor, "B *M"]) -> Int64[Tensor, "..."]:
    """d of strings along the first dimension; broadcasts all other dimensions.

    A letter of -1 is padding at the end of a string: inserting or deleting it costs nothing. A B steps.
    """
    shape = torch.broadcast_shapes(first.shape[1:], second.shape[1:])
    row, costs = [first.new_zeros(shape)], (second >= 0).unbind()
    for cost in costs:
        row.append(row[-1] + cost)
    for x, deletion in zip(first, first >= 0, strict=True):
        previous, row = row, [row[0] + deletion]
        for j, (y, cost) in enumerate(zip(second, costs, strict=True)):
            gap_cost = torch.minimum(previous[j + 1] + deletion, row[j] + cost)
            row.append(torch.minimum(previous[j] + (x != y), gap_cost))
    return row[-1].long()


def edit_distance_table(first: Sequence[bytes], second: Sequence[bytes]) -> Int64[Tensor, "A B"]:
    """d(first[i], second[j]) of all pairs; each pair of distinct strings is compared once."""
    (rows, first_index), (columns, second_index) = (_deduplicate(side) for side in (first, second))
    costs = torch.zeros(len(rows), len(columns), dtype=torch.int64)
    for i in range(0, len(rows), BLOCK):  # shortest first, which leaves little padding
        for j in range(0, len(columns), BLOCK):
            row_letters, column_letters = (
                bytes_to_columns(rows[i : i + BLOCK]),
                bytes_to_columns(columns[j : j + BLOCK]),
            )
            costs[i : i + BLOCK, j : j + BLOCK] = edit_distances(row_letters[:, :, None], column_letters[:, None, :])
    return costs[first_index][:, second_index]


def dtw_path(costs: Int64[Tensor, "A B"]) -> Int64[Tensor, "P 2"]:
    """The cheapest path through `costs` from the first cell to the last, as pairs (i, j), ascending.

    O(A) steps over B cells; A B cells of memory.
    """
    if not costs.numel():
        return costs.new_zeros(0, 2)
    total = torch.empty_like(costs)
    total[0] = costs[0].cumsum(0)
    for i in range(1, len(costs)):
        row_sums = costs[i].cumsum(0)
        entry = total[i - 1].clone()
        entry[1:] = torch.minimum(entry[1:], total[i - 1, :-1])
        total[i] = (entry + costs[i] - row_sums).cummin(0).values + row_sums
    return _trace_path(total)


def find_single_matches(path: Int64[Tensor, "P 2"], tokens: int) -> Int64[Tensor, " B"]:
    """For each token of the second side, its token of the first side on the path; -1 if it has several."""
    is_ambiguous = torch.bincount(path[:, 1], minlength=tokens) != 1
    partner = path.new_full((tokens,), -1).scatter(0, path[:, 1], path[:, 0])
    return partner.masked_fill(is_ambiguous, -1)


def bytes_to_columns(strings: Sequence[bytes]) -> Int16[Tensor, "W N"]:
    """The bytes of each string as a column, padded with -1 to the longest."""
    width = max(map(len, strings), default=0)
    rows = [[*text, *[-1] * (width - len(text))] for text in strings]
    return torch.tensor(rows, dtype=torch.int16).reshape(len(strings), width).T.contiguous()


def _deduplicate(strings: Sequence[bytes]) -> tuple[list[bytes], Int64[Tensor, " N"]]:
    """The distinct strings, shortest first, and for each string its index among them."""
    index = {text: n for n, text in enumerate(sorted(set(strings), key=lambda text: (len(text), text)))}
    return list(index), torch.tensor([index[text] for text in strings], dtype=torch.int64)


def _trace_path(total: Int64[Tensor, "A B"]) -> Int64[Tensor, "P 2"]:
    padded = torch.nn.functional.pad(
        total, (1, 0, 1, 0), value=int(total.max()) + 1
    )  # the path never enters the border
    diagonal, above, previous = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1]
    moves = torch.where(
        diagonal <= torch.minimum(above, previous), BOTH, torch.where(above <= previous, FIRST, SECOND)
    ).tolist()
    i, j = total.shape[0] - 1, total.shape[1] - 1
    path = [(i, j)]
    while i or j:
        move = moves[i][j]
        i, j = i - (move != SECOND), j - (move != FIRST)
        path.append((i, j))
    return torch.tensor(path[::-1], dtype=torch.int64)
