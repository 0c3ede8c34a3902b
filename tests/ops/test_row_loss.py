"""A weighted row loss is the loss times its weights, in value and gradient."""

import torch

from potstill.ops.row_loss import CrossEntropyRows, Weighted


def test_weights_multiply_values_and_gradients_whatever_their_sign() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets, said = torch.tensor([0, 5, 2, 2]), {"w": torch.tensor([2.0, 0.0, -1.5, 1.0], dtype=torch.float64)}
    loss = Weighted(CrossEntropyRows(), "w")
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none") * said["w"]
    (by_hand,) = torch.autograd.grad(expected.sum(), logits)
    values, gradient = loss.with_gradient(logits.detach(), said, targets)
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(loss(logits.detach(), said, targets), expected.detach())
    torch.testing.assert_close(gradient, by_hand)
    assert not gradient[1].any()
