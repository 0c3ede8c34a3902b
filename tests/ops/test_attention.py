"""Attention inside documents: the fast form, its definition by dense mask, and the sum it stands for."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from potstill.ops.attention import (
    MAX_MASK_SIZE,
    MIN_CHUNK,
    Prefix,
    causal_mask,
    continuation_starts,
    dense_attention,
    document_attention,
    document_lengths,
    document_prefixes,
    document_starts,
)

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(rows: int, size: int, *, groups: int = 2, heads: int = 4, wide: int = 6, dtype: torch.dtype) -> Inputs:
    q = torch.randn(rows, heads, size, wide, dtype=dtype)
    k = torch.randn(rows, groups, size, wide, dtype=dtype)
    return q, k, torch.randn(rows, groups, size, wide + 2, dtype=dtype)


def cut(size: int, edges: list[int]) -> tuple[int, ...]:
    marks = sorted({0, size, *(e for e in edges if 0 < e < size)})
    return tuple(b - a for a, b in pairwise(marks))


@settings(max_examples=40)
@given(
    size=st.integers(1, 13),
    edges=st.lists(st.lists(st.integers(1, 12), max_size=4), min_size=1, max_size=3),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3, 50]),
)
def test_by_document_equals_plain_in_value_and_every_gradient(
    size: int, edges: list[list[int]], groups: int, window: int | None
) -> None:
    lengths = [cut(size, row) for row in edges]
    q, k, v = inputs(len(lengths), size, groups=groups, dtype=torch.float64)
    outcomes = []
    for form in (document_attention, dense_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = form(*leaves, lengths, scale=0.3, window=window)
        outcomes.append((y, *torch.autograd.grad((y * torch.arange(y.numel()).reshape(y.shape)).sum(), leaves)))
    for fast, definition in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [3, MIN_CHUNK, MIN_CHUNK + 30])
def test_chunks_of_a_document_longer_than_its_window_equal_plain(window: int) -> None:
    lengths = ((3 * MIN_CHUNK + 5, 40), (200, 3 * MIN_CHUNK - 155))
    q, k, v = inputs(2, 3 * MIN_CHUNK + 45, dtype=torch.float64)
    outcomes = []
    for form in (document_attention, dense_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = form(*leaves, lengths, scale=0.3, window=window)
        outcomes.append(
            (y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum(), leaves))
        )
    for fast, definition in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 16])
def test_nothing_kept_for_the_gradient_is_as_large_as_the_square_of_the_length(window: int | None) -> None:
    size, sizes = 1024, []
    q, k, v = (torch.randn(1, heads, size, 8, requires_grad=True) for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        document_attention(q, k, v, ((size,),), scale=0.3, window=window)
    assert sizes
    assert max(sizes) < size**2 / 8


@settings(max_examples=20)
@given(
    gaps=st.lists(st.lists(st.integers(1, 4), min_size=12, max_size=12), min_size=1, max_size=2),
    edges=st.lists(st.integers(1, 11), max_size=4),
    window=st.sampled_from([1, 3, 9]),
)
def test_windows_count_positions_where_tokens_are_missing(gaps: list[list[int]], edges: list[int], window: int) -> None:
    lengths, ids = [cut(12, edges)] * len(gaps), torch.tensor(gaps).cumsum(1)
    if len(gaps) > 1:
        lengths[1] = (5, 7)
    q, k, v = inputs(len(gaps), 12, dtype=torch.float64)
    fast, definition = (
        form(q, k, v, lengths, scale=0.3, window=window, position_ids=ids)
        for form in (document_attention, dense_attention)
    )
    torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)
    places = ids[:, :, None] - ids[:, None]
    for b, row in enumerate(lengths):
        document = torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row))
        is_visible = (places[b] >= 0) & (places[b] < window) & (document[:, None] == document)
        scores = (0.3 * q[b, 0] @ k[b, 0].mT).masked_fill(~is_visible, -math.inf)
        torch.testing.assert_close(definition[b, 0], scores.softmax(-1) @ v[b, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [document_attention, dense_attention])
@pytest.mark.parametrize("window", [None, 2])
def test_each_token_mixes_the_values_of_its_documents_past_by_the_softmax_of_the_scores(form, window) -> None:
    lengths, scale = ((3, 1, 2), (2, 4, 0)[:2]), 0.7
    q, k, v = inputs(2, 6, dtype=torch.float64)
    y = form(q, k, v, lengths, scale=scale, window=window)
    for b, row in enumerate(lengths):
        firsts = [sum(row[:d]) for d, n in enumerate(row) for _ in range(n)]
        for h in range(4):
            for t in range(6):
                seen = range(max(firsts[t], 0 if window is None else t - window + 1), t + 1)
                weights = [math.exp(scale * float(q[b, h, t] @ k[b, h // 2, s])) for s in seen]
                mixed = sum(w * v[b, h // 2, s] for w, s in zip(weights, seen, strict=True)) / sum(weights)
                torch.testing.assert_close(y[b, h, t], mixed, rtol=1e-9, atol=1e-9)


def test_documents_begin_at_a_row_s_first_token_and_wherever_positions_do_not_count_up() -> None:
    ids = torch.tensor([[0, 1, 2, 0, 1, 0], [4, 5, 6, 7, 8, 9], [0, 0, 0, 1, 5, 6]])
    assert document_lengths(ids) == ((3, 2, 1), (6,), (1, 1, 2, 2))
    assert document_starts(ids).sum().item() == 8


def test_boundaries_leave_the_positions_as_they_were() -> None:
    ids = torch.tensor([[3, 4, 0, 1]])
    document_lengths(ids)
    assert ids.tolist() == [[3, 4, 0, 1]]


def test_the_last_queries_of_a_longer_text_see_its_keys_up_to_themselves() -> None:
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(2, 4, window=2).tolist() == [[False, True, True, False], [False, False, True, True]]


def test_no_gradient_reaches_another_document_or_the_future() -> None:
    lengths, (q, k, v) = ((3, 4),), inputs(1, 7, dtype=torch.float64)
    v.requires_grad_()
    document_attention(q, k, v, lengths, scale=1.0)[0, :, 4].sum().backward()
    assert v.grad is not None
    assert (v.grad[0].abs().sum((0, 2)) > 0).tolist() == [False, False, False, True, True, False, False]


def test_a_gradient_on_a_cpu_comes_from_float32_also_where_rotary_positions_have_widened_queries_and_keys() -> None:
    lengths = ((5, 9, 2),)
    q, k, v = inputs(1, 16, dtype=torch.float32)
    v, upstream = v.bfloat16(), torch.randn(1, 4, 16, 8).bfloat16()
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    meant = torch.autograd.grad(document_attention(*wide, lengths, scale=0.4), wide, upstream.float())
    mixed = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = document_attention(*mixed, lengths, scale=0.4)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, mixed, upstream)
    for ours, theirs in zip(found, meant, strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


def test_autocast_leaves_float64_alone() -> None:
    exact = inputs(1, 16, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = document_attention(*exact, ((5, 9, 2),), scale=0.4)
    assert torch.equal(y, document_attention(*exact, ((5, 9, 2),), scale=0.4))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_keeps_its_dtype_and_its_gradients_are_those_of_float64_within_its_rounding(autocast) -> None:
    lengths = ((5, 9, 2),)
    exact = [x.requires_grad_() for x in inputs(1, 16, dtype=torch.float64)]
    halves = [x.detach().bfloat16().requires_grad_() for x in exact]
    upstream = torch.randn(1, 4, 16, 8, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        mixed = document_attention(*halves, lengths, scale=0.4)
    assert mixed.dtype == torch.bfloat16
    found = torch.autograd.grad(mixed, halves, upstream.bfloat16())
    meant = torch.autograd.grad(
        dense_attention(*(x.bfloat16().double() for x in exact), lengths, scale=0.4), exact, upstream
    )
    for ours, theirs in zip(found, meant, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_dropout_keeps_each_weight_with_its_probability_and_the_mean() -> None:
    # all weights of token t are 1 / (t + 1): a row's sum of kept weights counts them
    q, k, v = torch.zeros(1, 1, 40, 4), torch.zeros(1, 1, 40, 4), torch.eye(40)[None, None]
    shared = ((Prefix(), Prefix(0, 7)),)
    for lengths, window, prefixes in (
        (((40,),), None, None),
        (((20, 20),), None, None),
        (((40,),), 8, None),
        (((20, 20),), None, shared),
    ):
        weights = dense_attention(q, k, v, lengths, scale=1.0, window=window, prefixes=prefixes)
        draws = torch.stack(
            [
                document_attention(q, k, v, lengths, scale=1.0, window=window, dropout=0.25, prefixes=prefixes)
                for _ in range(200)
            ]
        )
        assert ((draws == 0) | torch.isclose(draws, weights / 0.75)).all()  # dropped, or scaled
        seen = weights > 0
        assert float((draws[:, seen] == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
        assert float((draws.mean(0) / weights)[seen].mean()) == pytest.approx(1, abs=0.01)


SHARED = torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 2, 3, 0, 1, 1, 2]])
# a prompt of 0 to 4, continuations from 3 and from 2; then a prompt of 0 and 1, and a continuation from 1


def test_a_continuation_sees_the_first_tokens_of_the_last_document_that_began_at_0() -> None:
    lengths = document_lengths(SHARED)
    assert lengths == ((5, 3, 2, 2, 2),)
    assert document_prefixes(SHARED, lengths) == ((Prefix(), Prefix(0, 3), Prefix(0, 2), Prefix(), Prefix(3, 1)),)
    assert continuation_starts(SHARED)[0].nonzero().flatten().tolist() == [5, 8, 12]


def test_positions_above_0_without_a_document_before_them_continue_nothing() -> None:
    ids = torch.tensor([[4, 5, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]])
    assert document_prefixes(ids, document_lengths(ids)) is None
    assert not continuation_starts(ids).any()


def test_a_continuation_right_after_its_prompt_is_one_document_with_it() -> None:
    ids = torch.tensor([[0, 1, 2, 3, 4, 2, 3]])  # a prompt of two tokens, and continuations of three and two
    lengths = document_lengths(ids)
    assert (lengths, document_prefixes(ids, lengths)) == (((5, 2),), ((Prefix(), Prefix(0, 2)),))


def shared_row(pieces: list[tuple[int, int]]) -> Tensor:
    """Positions of documents of these lengths; the second number, if positive, is where a continuation begins."""
    return torch.cat([torch.arange(first, first + length) for length, first in pieces])[None]


@settings(max_examples=40)
@given(
    pieces=st.lists(
        st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=5), min_size=1, max_size=2
    ),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3, 50]),
)
def test_shared_prompts_by_document_equal_plain_in_value_and_every_gradient(
    pieces: list[list[tuple[int, int]]], groups: int, window: int | None
) -> None:
    rows = [shared_row(row)[0] for row in pieces]
    ids = torch.stack([pad(row, (0, max(map(len, rows)) - len(row))) for row in rows])
    lengths = document_lengths(ids)
    given = {"scale": 0.3, "window": window, "prefixes": document_prefixes(ids, lengths)}
    q, k, v = inputs(len(ids), ids.shape[1], groups=groups, dtype=torch.float64)
    outcomes = []
    for form in (document_attention, dense_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = form(*leaves, lengths, **given)
        outcomes.append((y, *torch.autograd.grad((y * torch.arange(y.numel()).reshape(y.shape)).sum(), leaves)))
    for fast, definition in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [document_attention, dense_attention])
@pytest.mark.parametrize("window", [None, 3])
def test_a_continuation_mixes_what_it_would_mix_as_a_whole_document(form, window) -> None:
    lengths, prefixes = ((4, 2, 3),), ((Prefix(), Prefix(0, 3), Prefix(0, 4)),)
    q, k, v = inputs(1, 9, dtype=torch.float64)
    y = form(q, k, v, lengths, scale=0.5, window=window, prefixes=prefixes)
    for tokens, own in (([0, 1, 2, 4, 5], 2), ([0, 1, 2, 3, 6, 7, 8], 3)):
        whole = (x[:, :, tokens] for x in (q, k, v))
        alone = form(*whole, ((len(tokens),),), scale=0.5, window=window)
        torch.testing.assert_close(y[:, :, tokens[-own:]], alone[:, :, -own:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("prompt", "length", "window"),
    [
        (40, 2 * MIN_CHUNK + 5, 16),
        (2 * MIN_CHUNK, MIN_CHUNK + 3, MIN_CHUNK + 30),
        (30, 1010, None),  # the mask of its scores would be too large
    ],
)
def test_long_continuations_equal_plain(prompt: int, length: int, window: int | None) -> None:
    assert window is not None or length * (prompt + length) > MAX_MASK_SIZE
    lengths, prefixes = ((prompt + 3, length),), ((Prefix(), Prefix(0, prompt)),)
    q, k, v = inputs(1, prompt + 3 + length, groups=1, heads=2, dtype=torch.float64)
    outcomes = []
    for form in (document_attention, dense_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = form(*leaves, lengths, scale=0.3, window=window, prefixes=prefixes)
        outcomes.append(
            (y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum(), leaves))
        )
    for fast, definition in zip(*outcomes, strict=True):
        torch.testing.assert_close(fast, definition, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 16])
def test_nothing_kept_for_the_gradient_of_a_long_continuation_is_as_large_as_its_mask(window: int | None) -> None:
    size, sizes = 1024, []
    q, k, v = (torch.randn(1, heads, 2 * size, 8, requires_grad=True) for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        prefixes = ((Prefix(), Prefix(0, size)),)
        document_attention(q, k, v, ((size, size),), scale=0.3, window=window, prefixes=prefixes)
    assert sizes
    assert max(sizes) < size**2 / 8


def test_half_precision_of_a_continuation_comes_from_float32() -> None:
    lengths, prefixes = ((5, 9),), ((Prefix(), Prefix(0, 5)),)
    halves = [x.bfloat16() for x in inputs(1, 14, dtype=torch.float32)]
    mixed = document_attention(*halves, lengths, scale=0.4, prefixes=prefixes)
    wide = document_attention(*(x.float() for x in halves), lengths, scale=0.4, prefixes=prefixes)
    assert torch.equal(mixed, wide.bfloat16())
