"""Two tokenisations of one text, laid beside each other by bytes.

A token is the half-open span [start, end) of the bytes of the text that it stands for. The spans of one side ascend and
do not overlap; a token that stands for no text (a BOS, a template's own tokens) has an empty span and no counterpart.
Bytes and not strings, so that half a character, byte fallback and a space in front or behind need no special case, and
one disagreement costs the tokens that disagree and none behind them.

    exact        [ab|c|d] and [a|bc|d]     d with d               the same bytes, hence the same text before them
    beginnings   [ab|c|d] and [a|bc|d]     ab with a, d with d    predicted from the same text, whatever they then are
    merged       [ab|c|d] and [a|bc|d]     {ab c | a bc}, {d | d} the shortest runs that stand for the same bytes

`exact` is the definition of exact token alignment (DSKDv2, arXiv:2504.11426), found by bytes where the released code
compares strings token by token and loses all that follows a disagreement of equal length. `merged` is the segmentation
that merging by spans sums log-probabilities over (GOLD in TRL). All are O((T_a + T_b) log(T_a + T_b)).

Many documents are laid out at once, each at bytes of its own. Where texts differ outside of what they share (two chat
templates around one conversation), `shared` moves the spans of either side to the bytes of what is shared.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

Spans = Int64[Tensor, "T 2"]
Pairs = Int64[Tensor, "P 2"]  # numbers of tokens of the first and of the second side, both strictly ascending


class Groups(NamedTuple):
    """For each token the number of its group, ascending from 0, or -1 where it has no counterpart; and how many."""

    first: Int64[Tensor, " A"]
    second: Int64[Tensor, " B"]
    total: int


def exact(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Pairs:
    """The pairs of tokens that stand for the same bytes: i with j where first[i] = second[j], not empty."""
    pairs = beginnings(first, second)
    return pairs[first[pairs[:, 0], 1] == second[pairs[:, 1], 1]]


def beginnings(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Pairs:
    """The pairs of tokens that begin at the same byte, so that both are predicted from the same text."""
    ours, theirs = _real(first), _real(second)
    begins, others = first[ours, 0], second[theirs, 0]
    if not len(others):
        return torch.stack([ours[:0], ours[:0]], -1)
    place = torch.searchsorted(others, begins).clamp(max=len(others) - 1)
    same = others[place] == begins
    return torch.stack([ours[same], theirs[place[same]]], -1)


def merged(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Groups:
    """The finest runs of tokens that stand for the same bytes on both sides, without a gap on either."""
    sides = [_real(first), _real(second)]
    tokens = [spans[real] for spans, real in zip((first, second), sides, strict=True)]
    ours, theirs = (torch.unique(spans) for spans in tokens)  # no token reaches across a cut that both sides have
    cuts = ours[torch.isin(ours, theirs, assume_unique=True)]
    runs = [torch.searchsorted(cuts, spans[:, 0].contiguous(), right=True) for spans in tokens]
    covered = [_covered(spans, run, len(cuts) + 1) for spans, run in zip(tokens, runs, strict=True)]
    start, end, size = covered[0].unbind(-1)
    whole = (covered[0] == covered[1]).all(-1) & (end - start == size) & (size > 0)
    number = torch.where(whole, whole.cumsum(0) - 1, -1)
    found = [torch.full_like(spans[:, 0], -1) for spans in (first, second)]
    for group, real, run in zip(found, sides, runs, strict=True):
        group[real] = number[run]
    return Groups(found[0], found[1], int(whole.sum()))


def shared(spans: Spans, own: Int64[Tensor, "S 2"], common: Int64[Tensor, "S 2"]) -> Spans:
    """`spans` moved from the segments `own` of their text to the segments `common` that both sides share.

    Both lists ascend. Within two segments of one length a byte keeps its place. Two of different lengths (one stop
    string and another) stand for each other as a whole: only the token that is all of `own` is moved, to all of
    `common`. Every other token, one that reaches across the end of a segment too, has an empty span.
    """
    if not len(own):
        return torch.zeros_like(spans)
    at = (torch.searchsorted(own[:, 0].contiguous(), spans[:, 0].contiguous(), right=True) - 1).clamp(min=0)
    inside = (spans[:, 0] >= own[at, 0]) & (spans[:, 1] <= own[at, 1]) & (spans[:, 0] < spans[:, 1])
    even = (own[at, 1] - own[at, 0]) == (common[at, 1] - common[at, 0])
    moved = spans - own[at, :1] + common[at, :1]
    moved = torch.where(even[:, None], moved, common[at])
    kept = inside & (even | (spans == own[at]).all(-1))
    reached = torch.where(kept, moved[:, 1], 0).cummax(0).values  # an empty span lies behind all before it
    return torch.where(kept[:, None], moved, reached[:, None])


def share(found: Int64[Tensor, " P"], trained: Bool[Tensor, " T"]) -> float:
    """The share of the `trained` tokens whose numbers are among `found`; 1 where none is trained."""
    total = int(trained.sum())
    return int(trained[found].sum()) / total if total else 1.0


def _real(spans: Spans) -> Int64[Tensor, " R"]:
    """The numbers of the tokens that stand for text."""
    assert bool((spans[1:, 0] >= spans[:-1, 1]).all()), "spans ascend and do not overlap"
    return torch.nonzero(spans[:, 0] < spans[:, 1])[:, 0]


def _covered(spans: Spans, run: Int64[Tensor, " T"], runs: int) -> Int64[Tensor, "R 3"]:
    """Of each run the first byte, the end, and how many bytes its tokens stand for; all zero where it has none."""
    nothing = spans.new_zeros(runs)
    start = nothing.scatter_reduce(0, run, spans[:, 0], "amin", include_self=False)
    end = nothing.scatter_reduce(0, run, spans[:, 1], "amax", include_self=False)
    return torch.stack([start, end, nothing.index_add(0, run, spans[:, 1] - spans[:, 0])], -1)
