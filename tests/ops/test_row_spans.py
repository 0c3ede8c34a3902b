"""Units of rows, and the spans that hold them whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from potstill.ops import fused, layout
from potstill.ops.row_loss import Constants, CrossEntropyRows, Tangent
from potstill.ops.row_spans import LikelihoodInputs, number_units, plan_spans, split_span


def inputs(*units: int) -> LikelihoodInputs:
    return LikelihoodInputs(torch.tensor(units, dtype=torch.long), lambda start, log_q: {})


def test_rows_from_the_first_to_the_last_of_a_set_are_one_unit() -> None:
    sets = torch.tensor([-1, 4, 4, -1, 4, 2, -1, -1, 0, 2, 0, 7])
    #                         |---------|  |-----------------|
    assert number_units(sets).tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3]
    assert number_units(torch.tensor([-1, -1])).tolist() == [0, 1]
    assert number_units(torch.tensor([], dtype=torch.long)).tolist() == []


def test_without_units_spans_are_chunks() -> None:
    assert plan_spans(7, 3, []) == [(0, 3), (3, 6), (6, 7)]
    assert plan_spans(0, 3, []) == []


def test_a_span_holds_as_many_units_as_fit_and_a_longer_unit_alone() -> None:
    units = inputs(0, 0, 1, 2, 3, 3, 3, 3, 3, 4, 5, 5)
    assert plan_spans(12, 4, [units]) == [(0, 4), (4, 9), (9, 12)]
    assert plan_spans(12, 100, [units]) == [(0, 12)]
    assert plan_spans(12, 1, [units]) == [(0, 2), (2, 3), (3, 4), (4, 9), (9, 10), (10, 12)]
    assert [*split_span((4, 9), 4)] == [(4, 8), (8, 9)]
    assert plan_spans(0, 4, [inputs()]) == []


def test_a_border_is_one_of_every_numbering() -> None:
    assert plan_spans(6, 1, [inputs(0, 0, 1, 1, 2, 2), inputs(0, 1, 2, 3, 3, 4)]) == [(0, 2), (2, 6)]


@settings(max_examples=100, derandomize=True)
@given(st.lists(st.integers(-1, 3), min_size=1, max_size=14), st.integers(1, 8))
def test_spans_cover_all_rows_and_cut_no_set(sets: list[int], chunk: int) -> None:
    spans = plan_spans(len(sets), chunk, [LikelihoodInputs(number_units(torch.tensor(sets)), lambda start, log_q: {})])
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(len(sets)))
    for number in set(sets) - {-1}:
        rows = [row for row, value in enumerate(sets) if value == number]
        assert sum(start <= rows[0] and rows[-1] < stop for start, stop in spans) == 1
    assert all(stop - start <= chunk or set(sets[start:stop]) != {-1} for start, stop in spans)


# a loss of sets of rows, in one pass over the head


def square_sums(sets: Tensor) -> LikelihoodInputs:
    """sum over sets of S^2, S the sum of log q(target) over the rows of a set."""

    def compute(start: int, log_q: Tensor) -> dict[str, Tensor]:
        here = sets[start : start + len(log_q)]
        is_member, tangent = here >= 0, torch.zeros(len(log_q), 3, dtype=log_q.dtype)
        sums = torch.zeros(9, dtype=log_q.dtype).index_add(0, here[is_member], log_q[is_member])
        for number in set(here[is_member].tolist()):
            tangent[int((here == number).nonzero()[0]), 0] = sums[number].square()
        tangent[is_member, 1] = 2 * sums[here[is_member]]
        tangent[:, 2] = log_q
        return {"square": tangent, "member": is_member.to(log_q.dtype)}

    return LikelihoodInputs(number_units(sets), compute)


@settings(max_examples=60, derandomize=True)
@given(
    sets=st.lists(st.integers(-1, 3), max_size=14),
    chunk=st.integers(1, 16),
    block=st.integers(1, 20),
    even=st.sampled_from([2, 4, 32]),
    mix=st.sampled_from([(1.0, 0.0, 0.0), (0.5, -2.0, 0.0), (0.5, 1.0, 3.0)]),
)
def test_a_loss_of_sets_of_rows_is_plain_in_value_and_every_gradient_whatever_the_chunk(
    sets: list[int], chunk: int, block: int, even: int, mix: tuple[float, ...]
) -> None:
    numbers = torch.tensor(sets, dtype=torch.long)
    rows, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((len(sets), 3), (5, 3), (5,)))
    leaves, targets = [x.requires_grad_() for x in (rows, weight, bias)], torch.randint(5, (len(sets),))
    log_q = -torch.nn.functional.cross_entropy(0.5 * (rows @ weight.T + bias), targets, reduction="none")
    squares = [log_q[numbers == number].sum().square() for number in set(sets) - {-1}]
    expected = [sum(squares, torch.zeros(())), -log_q.sum(), torch.tensor(float((numbers >= 0).sum()))]
    losses, options = (Tangent("square"), CrossEntropyRows(), Constants("member")), {"targets": targets, "frozen": {}}
    sources, head = [square_sums(numbers)], (weight, bias, 0.5, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "BLOCK", block)
        patch.setattr(layout, "ROW_MULTIPLE", even)
        forms = (
            fused.sum_row_losses(losses, rows, head, mix=mix, likelihoods=sources, chunk=chunk, **options),
            fused.sum_row_losses(losses, rows, head, mix=(0.0, 0.0, 1.0), likelihoods=sources, chunk=chunk, **options),
            fused.sum_row_losses_densely(losses, rows, head, likelihoods=sources, **options),
        )
        gradients = torch.autograd.grad(sum(w * x for w, x in zip(mix, expected, strict=True)), leaves)  # type: ignore[call-overload]
        for values in forms:
            torch.testing.assert_close(values, tuple(expected), rtol=1e-9, atol=1e-11, check_dtype=False)
            total = sum(w * value for w, value in zip(mix, values, strict=True))
            for a, b in zip(torch.autograd.grad(total, leaves), gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_logits_of_a_set_that_fits_a_chunk_are_computed_once() -> None:
    sets, products = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2]), []
    write = fused._write_logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_write_logits", lambda *args: (products.append(len(args[1])), write(*args))[1])
        head, options = (torch.randn(5, 3), None, 1.0, None), {"targets": torch.randint(5, (10,)), "frozen": {}}
        for chunk, expected in ((5, [5, 5]), (100, [10]), (4, [3, 2, 4, 1, 4, 1])):
            products.clear()
            fused.sum_row_losses(
                [Tangent("square")],
                torch.randn(10, 3, requires_grad=True),
                head,
                mix=[1.0],
                likelihoods=[square_sums(sets)],
                chunk=chunk,
                **options,
            )
            assert products == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_likelihoods_are_those_of_the_pass_bit_by_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    units = torch.arange(90) // 9
    rows, head, targets = torch.randn(90, 16), (torch.randn(50, 16), None, 1.0, None), torch.randint(50, (90,))
    seen: list[Tensor] = []

    def compute(start: int, log_q: Tensor) -> dict[str, Tensor]:
        seen.append(log_q)
        return {"nothing": torch.zeros_like(log_q)}

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        options = {"targets": targets, "frozen": {}, "mix": [1.0], "likelihoods": [LikelihoodInputs(units, compute)]}
        fused.sum_row_losses([Constants("nothing")], rows, head, chunk=40, **options)
        log_p = fused.compute_log_likelihoods(rows, head, targets, units=units, chunk=40)
    assert torch.equal(torch.cat(seen), log_p)
    dense = -torch.nn.functional.cross_entropy(rows @ head[0].T, targets, reduction="none")
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(log_p, dense, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused.compute_log_likelihoods(rows, head, targets, chunk=7), dense)
