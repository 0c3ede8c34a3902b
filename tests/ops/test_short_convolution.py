"""The short convolution is its loop in value and every gradient, whatever the cuts, documents and spans."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

from potstill.ops import short_convolution as module
from potstill.ops.short_convolution import short_convolution, short_convolution_loop


def inputs(length: int = 11, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((2, length, 3), (3, width), (2, width - 1, 3))
    x, weight, tail = (torch.randn(*size, dtype=torch.float64).requires_grad_() for size in sizes)
    return x, weight, tail


def results(function, x: Tensor, weight: Tensor, tail: Tensor | None, starts: Tensor | None) -> list[Tensor]:
    """Outputs, tail, and every gradient of a random sum of both."""
    torch.manual_seed(1)
    y, last = function(x, weight, tail, starts=starts)
    total = sum((out * torch.randn(out.shape, dtype=out.dtype)).sum() for out in (y, last))
    return [y, last, *torch.autograd.grad(total, [z for z in (x, weight, tail) if z is not None])]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("has_tail", [True, False])
@pytest.mark.parametrize("starts", [(), (0,), (0, 3, 4, 9)])
def test_it_is_the_loop_in_value_and_every_gradient(
    width: int, length: int, has_tail: bool, starts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPAN", 5)
    x, weight, tail = inputs(length, width)
    is_start = torch.zeros(2, length, dtype=torch.bool)
    is_start[0, [i for i in starts if i < length]] = True
    arguments = (x, weight, tail if has_tail else None, is_start if starts else None)
    for ours, definition in zip(
        results(short_convolution, *arguments), results(short_convolution_loop, *arguments), strict=True
    ):
        torch.testing.assert_close(ours, definition)


def test_a_number_by_hand() -> None:
    x, weight = torch.tensor([[[1.0], [2.0], [-1.0]]]), torch.tensor([[10.0, 3.0]])
    expected = silu(torch.tensor([3.0, 10.0 + 6.0, 20.0 - 3.0]))
    y, tail = short_convolution(x, weight)
    torch.testing.assert_close(y[0, :, 0], expected)
    assert tail.tolist() == [[[-1.0]]]


def test_it_is_torch_s_depthwise_convolution() -> None:
    x, weight, _ = inputs()
    expected = silu(conv1d(pad(x.mT, (3, 0)), weight[:, None], groups=3)).mT
    torch.testing.assert_close(short_convolution(x, weight)[0], expected)


@pytest.mark.parametrize("cut", range(1, 11))
def test_text_in_two_pieces_is_the_whole(cut: int) -> None:
    x, weight, _ = inputs()
    whole, last = short_convolution(x, weight)
    first, tail = short_convolution(x[:, :cut], weight)
    second, tail = short_convolution(x[:, cut:], weight, tail)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(tail, last)


def test_a_document_keeps_its_bits_when_another_changes() -> None:
    x, weight = torch.randn(1, 9, 3), torch.randn(3, 4)
    starts = torch.arange(9)[None] % 5 == 0
    other = torch.cat([torch.randn(1, 5, 3), x[:, 5:]], 1)
    assert torch.equal(
        short_convolution(other, weight, starts=starts)[0][:, 5:], short_convolution(x, weight, starts=starts)[0][:, 5:]
    )


def test_half_precision_sums_in_float32() -> None:
    x, weight, _ = (z.detach() for z in inputs(length=300))
    exact = short_convolution(x.bfloat16().double(), weight.bfloat16().double())[0]
    y, tail = short_convolution(x.bfloat16(), weight.bfloat16())
    assert (y.dtype, tail.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(y, exact.bfloat16(), rtol=0.01, atol=1e-6)
