"""The fused sums are the plain ones in value and every gradient, and never hold all logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from potstill.core.types import Head
from potstill.ops import fused, layout
from potstill.ops.divergence import DIVERGENCES, cross_entropy, forward_kl, jsd, total_variation
from potstill.ops.fused import FrozenInputs, HeadLike, rows_per_chunk, sum_row_losses, sum_row_losses_densely
from potstill.ops.row_loss import CrossEntropyRows, DivergenceRows, RowLoss

law = settings(max_examples=60, derandomize=True)


def total_variation_to_other(student: Tensor, frozen: Mapping[str, Tensor], targets: Tensor) -> Tensor:
    """A row loss that is only a function: no derivative written by hand."""
    return total_variation(frozen["other"], student)


LOSSES: tuple[RowLoss, ...] = (
    CrossEntropyRows(),
    DivergenceRows(temperature=2.0),
    DivergenceRows(partial(jsd, beta=0.3), temperature=0.7, teacher="other"),
    total_variation_to_other,
)


@dataclass
class Case:
    """Rows, a head, targets and two teachers; `asked` lists the rows that the teachers were asked for."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    targets: Tensor
    teachers: dict[str, Tensor]
    asked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def head(self) -> HeadLike:
        return self.weight, self.bias, self.scale, self.softcap

    @property
    def frozen(self) -> FrozenInputs:
        return {name: partial(self.ask, name) for name in self.teachers}

    def ask(self, name: str, start: int, stop: int) -> Tensor:
        assert not torch.is_grad_enabled()
        self.asked.append((start, stop))
        return self.teachers[name][start:stop]

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.rows, self.weight, self.bias) if x is not None]


def case(
    n: int = 7,
    v: int = 5,
    f: int = 3,
    *,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Case:
    return Case(
        torch.randn(n, f, dtype=dtype).requires_grad_(),
        torch.randn(v, f, dtype=dtype).requires_grad_(),
        torch.randn(v, dtype=dtype).requires_grad_() if bias else None,
        scale,
        softcap,
        torch.randint(v, (n,)),
        {name: torch.randn(n, v, dtype=dtype) for name in ("teacher", "other")},
    )


def run(
    what: Callable[..., tuple[Tensor, ...]],
    some: Case,
    upstream: Sequence[float],
    losses: Sequence[RowLoss] = LOSSES,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """The sums, and the gradients of sum_k upstream[k] S_k by every leaf."""
    values = what(losses, some.rows, some.head, targets=some.targets, frozen=some.frozen, **options)
    total = sum((weight * value for weight, value in zip(upstream, values, strict=True)), torch.zeros(()))
    return [value.detach() for value in values], list(torch.autograd.grad(total, some.leaves))


def assert_same(one: tuple[list[Tensor], list[Tensor]], other: tuple[list[Tensor], list[Tensor]]) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


cases = st.builds(
    case,
    st.integers(0, 11),
    st.integers(1, 7),
    st.integers(1, 4),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.25, -3.0]),
    softcap=st.sampled_from([None, 1.5, 30.0]),
)
mixes = st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, -2.0, 1e-3])] * len(LOSSES))


@law
@given(
    some=cases,
    mix=mixes,
    factor=st.sampled_from([1.0, -0.125, 3.0]),
    chunk=st.integers(1, 12),
    block=st.integers(1, 20),
    even=st.sampled_from([2, 4, 32]),
)
def test_fused_is_plain_in_value_and_every_gradient_whatever_the_chunk(
    some: Case, mix: tuple[float, ...], factor: float, chunk: int, block: int, even: int
) -> None:
    upstream = [factor * weight for weight in mix]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "BLOCK", block)
        patch.setattr(layout, "ROW_MULTIPLE", even)
        assert_same(
            run(sum_row_losses, some, upstream, mix=mix, chunk=chunk), run(sum_row_losses_densely, some, upstream)
        )


@law
@given(some=cases, mix=st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, -2.0])] * 3), chunk=st.integers(1, 12))
def test_losses_that_share_a_softmax_are_plain(some: Case, mix: tuple[float, ...], chunk: int) -> None:
    losses = (DivergenceRows(), CrossEntropyRows(), DivergenceRows(temperature=2.0, teacher="other"))
    assert_same(
        run(sum_row_losses, some, mix, losses, mix=mix, chunk=chunk), run(sum_row_losses_densely, some, mix, losses)
    )


@law
@given(some=cases, mix=mixes, upstream=mixes, chunk=st.integers(1, 12))
def test_a_backward_that_breaks_its_promise_about_the_mix_gets_the_right_gradient(
    some: Case, mix: tuple[float, ...], upstream: tuple[float, ...], chunk: int
) -> None:
    assert_same(run(sum_row_losses, some, upstream, mix=mix, chunk=chunk), run(sum_row_losses_densely, some, upstream))


@pytest.mark.parametrize("loss", [*LOSSES, DivergenceRows(teacher="other"), *map(DivergenceRows, DIVERGENCES.values())])
def test_each_loss_alone_is_plain(loss: RowLoss) -> None:
    some = case(9, 6, 4)
    assert_same(
        run(sum_row_losses, some, [1.0], [loss], mix=[1.0], chunk=4), run(sum_row_losses_densely, some, [1.0], [loss])
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("promised", [True, False])
def test_gradients_are_finite_differences(softcap: float | None, promised: bool) -> None:
    some = case(5, 4, 3, scale=0.5, softcap=softcap)
    weights = (0.5, 0.25, 2.0, -1.0)

    def total(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = (weight, bias, some.scale, some.softcap)
        mix = weights if promised else (1.0, 0.0, 0.0, 0.0)
        values = sum_row_losses(LOSSES, rows, head, targets=some.targets, frozen=some.frozen, mix=mix, chunk=2)
        return sum(w * value for w, value in zip(weights, values, strict=True))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(total, (some.rows, some.weight, some.bias))


def test_the_sums_are_those_of_the_losses_over_the_logits_of_the_head() -> None:
    some = case(6, 5, 3, scale=0.5, softcap=2.0)
    logits = Head(some.weight, some.bias, some.scale, some.softcap).logits(some.rows)
    expected = (
        cross_entropy(logits, some.targets).sum(),
        4 * forward_kl(some.teachers["teacher"] / 2, logits / 2).sum(),
        0.49 * jsd(some.teachers["other"] / 0.7, logits / 0.7, beta=0.3).sum(),
        total_variation(some.teachers["other"], logits).sum(),
    )
    for form in (sum_row_losses_densely, partial(sum_row_losses, mix=[1.0] * 4, chunk=4)):
        values = form(LOSSES, some.rows, Head(*some.head), targets=some.targets, frozen=some.frozen)
        torch.testing.assert_close(values, expected)


def test_where_the_promise_is_kept_each_teacher_is_asked_for_each_row_once() -> None:
    some = case(7)
    run(sum_row_losses, some, [3.0, 6.0, 0.0, 1.5], mix=[0.2, 0.4, 0.0, 0.1], chunk=3)
    assert some.asked == [chunk for chunk in ((0, 3), (3, 6), (6, 7)) for _ in some.teachers]


def test_a_promise_kept_up_to_rounding_is_recognised() -> None:
    some = case(7, dtype=torch.float32)
    mix = [0.3 / 7, 0.7 / 7]
    values = sum_row_losses(
        LOSSES[:2], some.rows, some.head, targets=some.targets, frozen=some.frozen, mix=mix, chunk=7
    )
    loss = (torch.tensor(0.3) * values[0] / 7 + torch.tensor(0.7) * values[1] / 7) * 1.7 / 3
    loss.backward()
    assert some.asked == [(0, 7)] * 2


def test_a_promise_broken_in_a_small_weight_is_noticed() -> None:
    some = case(7)
    run(sum_row_losses, some, [1.0, 2e-15, 0.0, 0.0], mix=[1.0, 1e-15, 0.0, 0.0], chunk=7)
    assert some.asked == [(0, 7)] * 4


def test_a_second_backward_gives_the_same_gradient() -> None:
    some = case()
    values = sum_row_losses(
        LOSSES[:2], some.rows, some.head, targets=some.targets, frozen=some.frozen, mix=[0.5, 0.5], chunk=3
    )
    total = 0.3 * (values[0] + values[1])
    first = torch.autograd.grad(total, some.leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(total, some.leaves)
    torch.testing.assert_close(second, first, rtol=1e-12, atol=0)
    assert all(map(torch.equal, first, kept))


@pytest.mark.parametrize("wanted", ["rows", "weight", "bias"])
def test_only_what_requires_a_gradient_gets_one(wanted: str) -> None:
    some = case()
    _, expected = run(sum_row_losses_densely, some, [0.5, 0.5], LOSSES[:2])
    expected_one = dict(zip(("rows", "weight", "bias"), expected, strict=True))[wanted]
    for name in ("rows", "weight", "bias"):
        getattr(some, name).requires_grad_(name == wanted)
    values = sum_row_losses(
        LOSSES[:2], some.rows, some.head, targets=some.targets, frozen=some.frozen, mix=[1.0, 1.0], chunk=2
    )
    (0.5 * (values[0] + values[1])).backward()
    for name in ("rows", "weight", "bias"):
        assert (getattr(some, name).grad is not None) == (name == wanted)
    torch.testing.assert_close(getattr(some, wanted).grad, expected_one)


def test_a_weight_that_also_embeds_gets_both_gradients() -> None:
    tokens = torch.tensor([0, 3, 1, 1, 4])
    gradients = []
    for form in (sum_row_losses_densely, partial(sum_row_losses, mix=[0.5, 0.5], chunk=2)):
        torch.manual_seed(3)
        some = case(5, 6, 4, bias=False)
        values = form(
            LOSSES[:2],
            some.weight[tokens].tanh(),
            some.head,
            targets=some.targets,
            frozen=some.frozen,
        )
        (0.5 * values[0] + 0.5 * values[1] + some.weight.square().sum()).backward()
        gradients.append(some.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@dataclass(frozen=True)
class NoGradient:
    """A row loss that can only be measured."""

    def __call__(self, student: Tensor, frozen: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return (student.argmax(-1) == targets).to(student.dtype)

    def values_and_gradient(self, *_: object) -> tuple[Tensor, Tensor]:
        raise AssertionError("a derivative was computed that nobody wants")


@pytest.mark.parametrize("why", ["grad mode is off", "nothing requires a gradient"])
def test_evaluation_computes_no_derivative(why: str) -> None:
    some = case(9)
    if why == "nothing requires a gradient":
        for leaf in some.leaves:
            leaf.requires_grad_(False)
    with torch.set_grad_enabled(why != "grad mode is off"):
        options = {"targets": some.targets, "frozen": some.frozen}
        (value,) = sum_row_losses([NoGradient()], some.rows, some.head, mix=[1.0], chunk=4, **options)
    assert not value.requires_grad
    assert value.item() == (Head(*some.head).logits(some.rows).argmax(-1) == some.targets).sum().item()


def test_a_term_of_no_weight_is_only_measured() -> None:
    some = case(9)
    values, gradients = run(
        sum_row_losses, some, [1.0, 0.0], [CrossEntropyRows(), NoGradient()], mix=[1.0, 0.0], chunk=4
    )
    assert values[1] == (Head(*some.head).logits(some.rows).argmax(-1) == some.targets).sum()
    torch.testing.assert_close(gradients, run(sum_row_losses_densely, some, [1.0], [CrossEntropyRows()])[1])


def test_no_rows_give_zero_sums_and_zero_gradients() -> None:
    values, gradients = run(sum_row_losses, case(0), [1.0] * 4, mix=[1.0] * 4)
    assert [value.item() for value in values] == [0.0] * 4
    assert all(bool((gradient == 0).all()) for gradient in gradients)


def test_no_losses_give_no_sums() -> None:
    some = case()
    assert sum_row_losses([], some.rows, some.head, targets=some.targets, frozen=some.frozen, mix=[]) == ()


def test_a_student_that_is_its_teacher_loses_nothing_and_learns_nothing() -> None:
    some = case(9, 6, 4, dtype=torch.bfloat16, softcap=3.0)
    head = Head(*(None if x is None or isinstance(x, float) else x.detach() for x in some.head[:2]), 1.0, 3.0)
    rows = some.rows.detach()
    some.teachers = {"teacher": head.logits(rows)}
    values, gradients = run(sum_row_losses, some, [1.0], [DivergenceRows(temperature=2.0)], mix=[1.0], chunk=9)
    assert values[0] == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return result


def test_no_tensor_is_larger_than_the_logits_of_one_chunk_or_the_head() -> None:
    n, v, f, chunk = 400, 300, 4, 8
    some = case(n, v, f, dtype=torch.float32)
    head = torch.randn(v, f)
    rows = some.rows.detach()

    def teacher(start: int, stop: int) -> Tensor:
        return rows[start:stop] @ head.T

    def largest(form: Callable[..., tuple[Tensor, ...]], upstream: float) -> int:
        with Largest() as seen:
            values = form(
                LOSSES[:3], some.rows, some.head, targets=some.targets, frozen={"teacher": teacher, "other": teacher}
            )
            (values[0] + values[1] + upstream * values[2]).backward()
        return seen.numel

    assert largest(sum_row_losses_densely, 1.0) >= n * v
    for upstream in (1.0, 2.0):  # the promise kept and broken
        assert largest(partial(sum_row_losses, mix=[1.0, 1.0, 1.0], chunk=chunk), upstream) <= max(
            chunk * v, v * f, n * f
        )


def test_half_precision_rows_give_gradients_in_the_dtypes_of_their_inputs() -> None:
    some = case(40, 30, 8, dtype=torch.float32)
    exact = run(sum_row_losses_densely, some, [0.5, 0.5], LOSSES[:2])
    half = some.rows.detach().bfloat16().requires_grad_()
    some.rows = half
    values, gradients = run(sum_row_losses, some, [0.5, 0.5], LOSSES[:2], mix=[0.5, 0.5], chunk=16)
    assert [value.dtype for value in values] == [torch.float32] * 2
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(values, exact[0], rtol=1e-2, atol=0)
    for gradient, reference in zip(gradients, exact[1], strict=True):
        assert (gradient - reference).norm() < 0.02 * reference.norm()


def test_the_gradient_of_the_head_is_accumulated_in_float32() -> None:
    n = 1024  # a bfloat16 accumulator of equal summands would stop growing at 256 of them
    some = case(1, 5, 3, dtype=torch.bfloat16)
    one = run(sum_row_losses, some, [1.0], [CrossEntropyRows()], mix=[1.0])[1]
    some.rows = some.rows.detach().repeat(n, 1).requires_grad_()
    some.targets = some.targets.repeat(n)
    some.teachers = {}
    many = run(sum_row_losses, some, [1.0], [CrossEntropyRows()], mix=[1.0], chunk=1)[1]
    for gradient, single in zip(many[1:], one[1:], strict=True):
        torch.testing.assert_close(gradient, n * single, rtol=0.01, atol=0)


def test_weights_divided_by_a_large_count_do_not_underflow() -> None:
    some = case(20, 6, 3, bias=False, dtype=torch.float32)
    reference = run(sum_row_losses_densely, some, [1.0], [CrossEntropyRows()])[1][1]
    some.rows = some.rows.detach().half().requires_grad_()
    tiny = 1e-9  # float16 holds nothing so small
    for mix in (tiny, 0.0):  # the promise kept and broken
        values = sum_row_losses(
            [CrossEntropyRows()], some.rows, some.head, targets=some.targets, frozen={}, mix=[mix], chunk=8
        )
        (gradient,) = torch.autograd.grad(tiny * values[0], some.weight)
        assert (gradient / tiny - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("upstream", [(0.5, 0.5), (0.5, 0.25)])
def test_under_autocast_logits_are_half_and_fused_is_plain(upstream: tuple[float, float]) -> None:
    some = case(20, 12, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = sum_row_losses_densely(LOSSES[:2], some.rows, some.head, targets=some.targets, frozen=some.frozen)
        seen: list[torch.dtype] = []
        values = sum_row_losses(
            LOSSES[:2], some.rows, some.head, targets=some.targets, frozen=some.frozen, mix=[0.5, 0.5], chunk=8
        )
        with Dtypes(seen):
            sum_row_losses(LOSSES[:1], some.rows.detach(), some.head, targets=some.targets, frozen={}, mix=[1.0])
    assert torch.bfloat16 in seen
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)
    totals = [upstream[0] * pair[0] + upstream[1] * pair[1] for pair in (values, expected)]  # backward outside
    for gradient, reference in zip(*(torch.autograd.grad(total, some.leaves) for total in totals), strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 0.01 * reference.norm()


class Dtypes(TorchDispatchMode):
    """Records the dtypes of matrix products."""

    def __init__(self, seen: list[torch.dtype]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in func.__name__:
            self.seen.append(result.dtype)
        return result


def test_under_autocast_a_loss_still_computes_in_float32() -> None:
    some = case(6, 40, 8, bias=False, dtype=torch.float32)
    shifted = {"teacher": (some.teachers["teacher"] + 100).bfloat16(), "other": some.teachers["other"]}
    some = Case(some.rows, some.weight, None, 1.0, None, some.targets, shifted)
    losses = (CrossEntropyRows(), DivergenceRows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = run(sum_row_losses, some, [0.5, 0.5], losses, mix=[0.5, 0.5], chunk=4)
        logits = torch.nn.functional.linear(some.rows, some.weight)
    expected = forward_kl(shifted["teacher"].float(), logits.float()).sum()
    torch.testing.assert_close(values[1], expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_teacher_is_asked_in_the_backward_as_it_was_in_the_forward() -> None:
    some = case(8, 6, 4, dtype=torch.float32)
    head, seen = torch.randn(6, 4), []

    def teacher(start: int, stop: int) -> Tensor:
        logits = some.rows[start:stop] @ head.T
        seen.append((logits.dtype, logits.requires_grad))
        return logits

    with torch.autocast("cpu", dtype=torch.bfloat16):
        (value,) = sum_row_losses(
            [DivergenceRows()], some.rows, some.head, targets=some.targets, frozen={"teacher": teacher}, mix=[0.0]
        )
    value.backward()
    assert seen == [(torch.bfloat16, False)] * 2


def test_autocast_leaves_float64_alone() -> None:
    some = case()
    expected = run(sum_row_losses_densely, some, [0.5, 0.5], LOSSES[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(run(sum_row_losses, some, [0.5, 0.5], LOSSES[:2], mix=[1.0, 1.0], chunk=3), expected)


def test_arguments_are_left_as_they_were() -> None:
    some = case(softcap=2.0, scale=0.5)
    tensors = [*some.leaves, some.targets, *some.teachers.values()]
    before = [x.clone() for x in tensors]
    run(sum_row_losses, some, [1.0] * 4, mix=[1.0] * 4, chunk=3)
    assert all(map(torch.equal, tensors, before))


def test_a_sum_can_be_added_to_in_place() -> None:
    some = case()
    options = {"targets": some.targets, "frozen": some.frozen}
    expected = run(sum_row_losses_densely, some, [1.0, 1.0], LOSSES[:2])[1]
    total, other = sum_row_losses(LOSSES[:2], some.rows, some.head, mix=[1.0, 1.0], chunk=3, **options)
    total += other
    torch.testing.assert_close(list(torch.autograd.grad(total, some.leaves)), expected)


def test_row_losses_are_values() -> None:
    assert DivergenceRows(forward_kl, 2.0) == DivergenceRows(temperature=2.0)
    assert DivergenceRows() != DivergenceRows(teacher="other")
    assert len({CrossEntropyRows(), CrossEntropyRows(), DivergenceRows()}) == 2


def test_a_call_that_does_not_fit_is_refused() -> None:
    some = case(4)
    options = {"targets": some.targets, "frozen": some.frozen, "mix": [1.0]}
    with pytest.raises(ValueError, match=r"mix = \(1.0,\) must give .* 4 losses"):
        sum_row_losses(LOSSES, some.rows, some.head, **options)
    with pytest.raises(ValueError, match=r"mix = \(nan,\)"):
        sum_row_losses(LOSSES[:1], some.rows, some.head, **{**options, "mix": [float("nan")]})
    with pytest.raises(ValueError, match="chunk = 0"):
        sum_row_losses(LOSSES[:1], some.rows, some.head, chunk=0, **options)
    every_row = {"teacher": lambda start, stop: some.teachers["teacher"]}
    with pytest.raises(ValueError, match="'teacher' gave 4 rows for rows 0 to 2"):
        sum_row_losses(LOSSES[1:2], some.rows, some.head, chunk=2, **{**options, "frozen": every_row})
    with pytest.raises(ValueError, match="temperature = 0"):
        DivergenceRows(temperature=0.0)


def test_targets_that_are_not_one_a_row_are_refused_where_shapes_are_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    some = case(4)
    with pytest.raises(ValueError, match="5 targets for 4 rows"):
        sum_row_losses(LOSSES[:1], some.rows, some.head, targets=torch.zeros(5, dtype=torch.long), frozen={}, mix=[1.0])


def test_the_logits_of_a_chunk_take_the_same_memory_at_any_vocabulary() -> None:
    sizes = {v: v * rows_per_chunk(v) for v in (1 << 15, 49_152, 1 << 16, 1 << 17, 1 << 18)}
    assert max(sizes.values()) <= 1.01 * min(sizes.values())
    assert rows_per_chunk(100) == 1024
    assert rows_per_chunk(1 << 30) == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_hold_every_row_once_and_of_no_rows_there_is_none(device: str) -> None:
    for rows in (0, 1, 7):
        logits = torch.empty(rows, fused.BLOCK // 2, device=device)
        assert [i for block in fused.split_rows(logits) for i in range(rows)[block]] == list(range(rows))


@pytest.mark.parametrize(
    ("cores", "vocabulary", "rows"), [(1, 49_152, 5), (2, 49_152, 4), (2, 2**18, 2), (16, 2**18, 16)]
)
def test_a_block_has_as_many_rows_for_each_core(
    cores: int, vocabulary: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    first, *_ = fused.split_rows(torch.empty(1, vocabulary).expand(100, -1))
    assert first == slice(0, rows)
    assert [*fused.split_rows(torch.empty(100, vocabulary, device="meta"))] == [slice(0, 100)]


def test_rows_of_several_cores_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(fused, "BLOCK", 1)
    some = case(11)
    assert_same(
        run(sum_row_losses, some, [0.7, 0.3], LOSSES[:2], mix=[0.7, 0.3], chunk=5),
        run(sum_row_losses_densely, some, [0.7, 0.3], LOSSES[:2]),
    )
