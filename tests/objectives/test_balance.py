"""The load-balancing loss beside its definition, written out by hand."""

import pytest
import torch
from tests.objectives.test_invariants import batch_of

from potstill.core.errors import UnsupportedModel
from potstill.core.types import Signals
from potstill.objectives.balance import ROUTER, Balance, load_balancing_loss
from potstill.objectives.config import ObjectiveConfig

# Four tokens and three experts: f = (3/4, 1/4, 0), P = (0.5, 0.3, 0.2).
PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2]])


def signals(probabilities: torch.Tensor) -> dict[str, Signals]:
    rows = torch.zeros(1, 2)
    return {"student": Signals(rows, lambda chunk: chunk, extras={ROUTER: probabilities})}


def test_the_loss_is_equation_4_of_switch_transformers() -> None:
    assert load_balancing_loss(PROBABILITIES).item() == pytest.approx(3 * (0.75 * 0.5 + 0.25 * 0.3))
    layers = torch.stack([PROBABILITIES, torch.full((4, 3), 1 / 3)])
    assert load_balancing_loss(layers).item() == pytest.approx((1.35 + 1) / 2)


def test_several_choices_share_a_token() -> None:
    # f = (7/8 .. ): token 1 chooses experts 0, 1; token 2: 0, 2; token 3: 0, 1; token 4: 1 and one of 0 and 2
    uneven = PROBABILITIES.clone()
    uneven[3] = torch.tensor([0.25, 0.6, 0.15])
    f, p = torch.tensor([4, 3, 1]) / 8, uneven.mean(0)
    assert load_balancing_loss(uneven, k=2).item() == pytest.approx(3 * float((f * p).sum()))


def test_an_even_load_costs_1_and_is_the_least_that_one_expert_for_all_exceeds() -> None:
    even = torch.eye(4).repeat(2, 1) * 0.4 + 0.15
    assert load_balancing_loss(even).item() == pytest.approx(1.0)
    assert load_balancing_loss(torch.eye(4)[[0] * 8]).item() == pytest.approx(4.0)


def test_the_gradient_flows_through_the_probabilities_alone() -> None:
    p = PROBABILITIES.clone().double().requires_grad_()
    load_balancing_loss(p).backward()
    assert p.grad is not None
    torch.testing.assert_close(p.grad, 3 * torch.tensor([0.75, 0.25, 0.0]).double().expand(4, 3) / 4)


def test_a_step_is_the_mean_over_micro_batches() -> None:
    objective, batch = ObjectiveConfig(name="0.01*balance").build(), batch_of(4)
    assert not objective.additive
    assert objective.weights == {"balance": 0.01}
    assert objective.counts(batch) == {"balance": 1}
    assert objective.needs(batch)["student"].extras == {ROUTER}
    assert objective(signals(PROBABILITIES), {}, batch)["balance"].item() == pytest.approx(1.35)


def test_a_student_without_a_router_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="needs a mixture of experts"):
        Balance()({"student": Signals(torch.zeros(1, 2), lambda chunk: chunk)}, {}, batch_of(4))
