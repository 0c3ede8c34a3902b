"""Alignment of two tokenizations of one text, by bytes.

A token has the half-open span [start, end) of the bytes that it covers. The spans of one side ascend and do not
overlap. A token without text (BOS, tokens of a chat template) has an empty span and no counterpart. Spans of bytes need
no special case for half a character, byte fallback, or a leading or trailing space. A disagreement affects only the
tokens that disagree.

    match_spans    [ab|c|d] and [a|bc|d]     d with d               the same bytes, hence the same text before them
    match_starts   [ab|c|d] and [a|bc|d]     ab with a, d with d    predicted from the same text
    merge_spans    [ab|c|d] and [a|bc|d]     {ab c | a bc}, {d | d} the shortest runs that cover the same bytes

`match_spans` is exact token alignment (DSKDv2, arXiv:2504.11426). The released code compares strings token by token and
loses everything after a disagreement of equal length; potstill does not. `merge_spans` is the segmentation over which
GOLD in TRL sums log-probabilities. All are O((T_a + T_b) log(T_a + T_b)).

The functions align many documents at once, each at its own offset of bytes. Two texts may share only segments, such as
one conversation in two chat templates. Then `map_to_shared_text` moves the spans of each side to the bytes of the
shared segments.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

Spans = Int64[Tensor, "T 2"]
Pairs = Int64[Tensor, "P 2"]  # token indices of the first and of the second side, both strictly ascending


class Groups(NamedTuple):
    """The group number of each token, ascending from 0, or -1 without a counterpart; and the number of groups."""

    first: Int64[Tensor, " A"]
    second: Int64[Tensor, " B"]
    total: int


def match_spans(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Pairs:
    """The pairs (i, j) of tokens that cover the same bytes: first[i] = second[j], not empty."""
    pairs = match_starts(first, second)
    return pairs[first[pairs[:, 0], 1] == second[pairs[:, 1], 1]]


def match_starts(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Pairs:
    """The pairs of tokens that start at the same byte, so that both models predict them from the same text."""
    first_tokens, second_tokens = _find_text_tokens(first), _find_text_tokens(second)
    first_starts, second_starts = first[first_tokens, 0], second[second_tokens, 0]
    if not len(second_starts):
        return torch.stack([first_tokens[:0], first_tokens[:0]], -1)
    index = torch.searchsorted(second_starts, first_starts).clamp(max=len(second_starts) - 1)
    is_match = second_starts[index] == first_starts
    return torch.stack([first_tokens[is_match], second_tokens[index[is_match]]], -1)


def merge_spans(first: Int64[Tensor, "A 2"], second: Int64[Tensor, "B 2"]) -> Groups:
    """The shortest runs of tokens that cover the same bytes on both sides, without a gap on either."""
    text_tokens = [_find_text_tokens(first), _find_text_tokens(second)]
    tokens = [spans[token_index] for spans, token_index in zip((first, second), text_tokens, strict=True)]
    first_edges, second_edges = (torch.unique(spans) for spans in tokens)
    # no token reaches across a cut that both sides have
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
    """`spans` moved from the segments `source` of their own text to the segments `target` of the shared text.

    Both lists ascend and correspond to each other. Within two segments of equal length a byte keeps its offset. Two
    segments of different lengths (two stop strings) correspond as a whole: only a token that covers all of `source` is
    moved, to all of `target`. Every other token gets an empty span, also one that crosses the end of a segment.
    """
    if not len(source):
        return torch.zeros_like(spans)
    segment = (torch.searchsorted(source[:, 0].contiguous(), spans[:, 0].contiguous(), right=True) - 1).clamp(min=0)
    is_inside = (spans[:, 0] >= source[segment, 0]) & (spans[:, 1] <= source[segment, 1]) & (spans[:, 0] < spans[:, 1])
    has_equal_length = (source[segment, 1] - source[segment, 0]) == (target[segment, 1] - target[segment, 0])
    shifted = spans - source[segment, :1] + target[segment, :1]
    shifted = torch.where(has_equal_length[:, None], shifted, target[segment])
    is_mapped = is_inside & (has_equal_length | (spans == source[segment]).all(-1))
    end = (
        torch.where(is_mapped, shifted[:, 1], 0).cummax(0).values
    )  # an empty span starts at the end of all spans before it
    return torch.where(is_mapped[:, None], shifted, end[:, None])


def compute_coverage(tokens: Int64[Tensor, " P"], is_trained: Bool[Tensor, " T"]) -> float:
    """The share of trained tokens whose indices are among `tokens`; 1 if none is trained."""
    total = int(is_trained.sum())
    return int(is_trained[tokens].sum()) / total if total else 1.0


def _find_text_tokens(spans: Spans) -> Int64[Tensor, " R"]:
    """The indices of the tokens that cover text."""
    assert bool((spans[1:, 0] >= spans[:-1, 1]).all()), "spans ascend and do not overlap"
    return torch.nonzero(spans[:, 0] < spans[:, 1])[:, 0]


def _get_run_extents(spans: Spans, run: Int64[Tensor, " T"], runs: int) -> Int64[Tensor, "R 3"]:
    """The first byte, the end and the number of covered bytes of each run; zeros for a run without tokens."""
    zeros = spans.new_zeros(runs)
    start = zeros.scatter_reduce(0, run, spans[:, 0], "amin", include_self=False)
    end = zeros.scatter_reduce(0, run, spans[:, 1], "amax", include_self=False)
    return torch.stack([start, end, zeros.index_add(0, run, spans[:, 1] - spans[:, 0])], -1)
