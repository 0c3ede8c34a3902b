"""The load-balancing loss beside its definition, written out by hand."""

import pytest
import torch
from tests.models.small import SMALL
from tests.objectives.test_invariants import batch_of, gradients
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import Signals
from potstill.layers.ffn.experts import ROUTER_LOGITS
from potstill.models.signals import compute_signals
from potstill.objectives.balance import Balance
from potstill.objectives.config import ObjectiveConfig
from potstill.ops.routing import load_balancing_loss
from potstill.train.training_module import TrainingModule

# Four tokens and three experts: f = (3/4, 1/4, 0), P = (0.5, 0.3, 0.2).
PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [0.5, 0.3, 0.2], [0.2, 0.6, 0.2]])


def layers_of(*probabilities: torch.Tensor) -> torch.Tensor:
    """Router logits [N L E] of these probabilities."""
    return torch.stack([p.log() for p in probabilities], 1)


def signals(probabilities: torch.Tensor) -> dict[str, Signals]:
    rows = torch.zeros(1, 2)
    return {"student": Signals(rows, lambda chunk: chunk, extras={ROUTER_LOGITS: layers_of(probabilities)})}


def test_the_loss_is_equation_4_of_switch_transformers() -> None:
    assert load_balancing_loss(layers_of(PROBABILITIES)).item() == pytest.approx(3 * (0.75 * 0.5 + 0.25 * 0.3))
    layers = layers_of(PROBABILITIES, torch.full((4, 3), 1 / 3))
    assert load_balancing_loss(layers).item() == pytest.approx((1.35 + 1) / 2)


def test_several_choices_share_a_token() -> None:
    # f = (7/8 .. ): token 1 chooses experts 0, 1; token 2: 0, 2; token 3: 0, 1; token 4: 1 and one of 0 and 2
    uneven = PROBABILITIES.clone()
    uneven[3] = torch.tensor([0.25, 0.6, 0.15])
    f, p = torch.tensor([4, 3, 1]) / 8, uneven.mean(0)
    assert load_balancing_loss(layers_of(uneven), k=2).item() == pytest.approx(3 * float((f * p).sum()))


def test_an_even_load_costs_1_and_is_the_least_that_one_expert_for_all_exceeds() -> None:
    even = torch.eye(4).repeat(2, 1) * 0.4 + 0.15
    assert load_balancing_loss(layers_of(even)).item() == pytest.approx(1.0)
    assert load_balancing_loss(layers_of(torch.eye(4)[[0] * 8].clamp(min=1e-30))).item() == pytest.approx(4.0)


def test_the_gradient_flows_through_the_probabilities_alone() -> None:
    logits = PROBABILITIES.double().log().requires_grad_()
    load_balancing_loss(logits[:, None]).backward()
    p, f = PROBABILITIES.double(), torch.tensor([0.75, 0.25, 0.0]).double()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, 3 / 4 * p * (f - (p * f).sum(-1, keepdim=True)), rtol=1e-6, atol=1e-9)


def test_a_mixture_of_experts_is_balanced_as_transformers_computes_it() -> None:
    config = MixtralConfig(**SMALL, num_local_experts=4)
    student, batch = AutoModelForCausalLM.from_config(config).eval(), batch_of(9, 5)
    batch["input_ids"] = batch["input_ids"] % 90
    batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["input_ids"])
    module = TrainingModule(student, ObjectiveConfig(name="cross_entropy+0.01*balance").build())
    sums = dict(zip(module.term_names, module(**batch)["sums"].tolist(), strict=True))
    signals = compute_signals(student, batch, Balance().needs(batch)["student"])
    layers = signals.extras[ROUTER_LOGITS].unbind(1)
    expected = sum(load_balancing_loss_func((layer,), 4, 1).item() for layer in layers) / len(layers)
    assert sums["balance"] == pytest.approx(expected, rel=1e-5)
    assert gradients(module, batch)
    with pytest.raises(UsageError, match="k is 5, and the student has 4 experts"):
        TrainingModule(student, ObjectiveConfig(name="cross_entropy+0.01*balance:k=5").build())(**batch)


def test_a_step_is_the_mean_over_micro_batches() -> None:
    objective, batch = ObjectiveConfig(name="0.01*balance").build(), batch_of(4)
    assert not objective.additive
    assert objective.weights == {"balance": 0.01}
    assert objective.counts(batch) == {"balance": 1}
    assert objective.needs(batch)["student"].extras == {ROUTER_LOGITS}
    assert objective(signals(PROBABILITIES), {}, batch)["balance"].item() == pytest.approx(1.35)


def test_a_student_without_a_router_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="needs a mixture of experts"):
        Balance()({"student": Signals(torch.zeros(1, 2), lambda chunk: chunk)}, {}, batch_of(4))
