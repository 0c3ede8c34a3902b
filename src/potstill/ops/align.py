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


def match_spans(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Pairs:
    """The pairs of tokens that stand for the same bytes: i with j where first[i] = second[j], not empty."""
    pairs = match_starts(first, second)
    return pairs[first[pairs[:, 0], 1] == second[pairs[:, 1], 1]]


def match_starts(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Pairs:
    """The pairs of tokens that begin at the same byte, so that both are predicted from the same text."""
    first_tokens, second_tokens = _find_text_tokens(first), _find_text_tokens(second)
    first_starts, second_starts = first[first_tokens, 0], second[second_tokens, 0]
    if not len(second_starts):
        return torch.stack([first_tokens[:0], first_tokens[:0]], -1)
    index = torch.searchsorted(second_starts, first_starts).clamp(max=len(second_starts) - 1)
    is_match = second_starts[index] == first_starts
    return torch.stack([first_tokens[is_match], second_tokens[index[is_match]]], -1)


def merge_spans(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Groups:
    """The finest runs of tokens that stand for the same bytes on both sides, without a gap on either."""
    text_tokens = [_find_text_tokens(first), _find_text_tokens(second)]
    tokens = [spans[token_index] for spans, token_index in zip((first, second), text_tokens, strict=True)]
    first_edges, second_edges = (
        torch.unique(spans) for spans in tokens
    )  # no token reaches across a cut that both sides have
    cuts = first_edges[torch.isin(first_edges, second_edges, assume_unique=True)]
    runs = [torch.searchsorted(cuts, spans[:, 0].contiguous(), right=True) for spans in tokens]
    extents = [_get_run_extents(spans, run, len(cuts) + 1) for spans, run in zip(tokens, runs, strict=True)]
    start, end, size = extents[0].unbind(-1)
    is_complete = (extents[0] == extents[1]).all(-1) & (end - start == size) & (size > 0)
    group_number = torch.where(is_complete, is_complete.cumsum(0) - 1, -1)
    groups = [torch.full_like(spans[:, 0], -1) for spans in (first, second)]
    for group, token_index, run in zip(groups, text_tokens, runs, strict=True):
        group[token_index] = group_number[run]
    return Groups(groups[0], groups[1], int(is_complete.sum()))


def map_to_shared_text(spans: Spans, source: Int64[Tensor, "S 2"], target: Int64[Tensor, "S 2"]) -> Spans:
    """`spans` moved from the segments `own` of their text to the segments `common` that both sides share.

    Both lists ascend. Within two segments of one length a byte keeps its place. Two of different lengths (one stop
    string and another) stand for each other as a whole: only the token that is all of `own` is moved, to all of
    `common`. Every other token, one that reaches across the end of a segment too, has an empty span.
    """
    if not len(source):
        return torch.zeros_like(spans)
    segment = (torch.searchsorted(source[:, 0].contiguous(), spans[:, 0].contiguous(), right=True) - 1).clamp(min=0)
    is_inside = (spans[:, 0] >= source[segment, 0]) & (spans[:, 1] <= source[segment, 1]) & (spans[:, 0] < spans[:, 1])
    has_equal_length = (source[segment, 1] - source[segment, 0]) == (target[segment, 1] - target[segment, 0])
    shifted = spans - source[segment, :1] + target[segment, :1]
    shifted = torch.where(has_equal_length[:, None], shifted, target[segment])
    is_mapped = is_inside & (has_equal_length | (spans == source[segment]).all(-1))
    end = torch.where(is_mapped, shifted[:, 1], 0).cummax(0).values  # an empty span lies behind all before it
    return torch.where(is_mapped[:, None], shifted, end[:, None])


def compute_coverage(tokens: Int64[Tensor, " P"], is_trained: Bool[Tensor, " T"]) -> float:
    """The share of the `trained` tokens whose numbers are among `found`; 1 where none is trained."""
    total = int(is_trained.sum())
    return int(is_trained[tokens].sum()) / total if total else 1.0


def _find_text_tokens(spans: Spans) -> Int64[Tensor, " R"]:
    """The numbers of the tokens that stand for text."""
    assert bool((spans[1:, 0] >= spans[:-1, 1]).all()), "spans ascend and do not overlap"
    return torch.nonzero(spans[:, 0] < spans[:, 1])[:, 0]


def _get_run_extents(spans: Spans, run: Int64[Tensor, " T"], runs: int) -> Int64[Tensor, "R 3"]:
    """Of each run the first byte, the end, and how many bytes its tokens stand for; all zero where it has none."""
    zeros = spans.new_zeros(runs)
    start = zeros.scatter_reduce(0, run, spans[:, 0], "amin", include_self=False)
    end = zeros.scatter_reduce(0, run, spans[:, 1], "amax", include_self=False)
    return torch.stack([start, end, zeros.index_add(0, run, spans[:, 1] - spans[:, 0])], -1)
