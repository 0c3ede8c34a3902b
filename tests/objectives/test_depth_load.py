"""The load of gated layers beside its definition, by hand."""

from dataclasses import replace

import pytest
import torch
from tests.objectives.test_invariants import batch_of
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.depth import EXECUTED, GATES, Depth
from potstill.core.errors import UnsupportedModel, UsageError
from potstill.core.types import Signals
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights
from potstill.models.families.registry import export_model
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.depth_load import DepthLoad, depth_load
from potstill.train.training_module import TrainingModule

GATE_VALUES = torch.tensor([0.9, 0.6, 0.5, 0.3])
PLAIN = Layer(Attention(4, 2, 4), SwiGLU(10))


def signals(gates: Tensor) -> dict[str, Signals]:
    extras = {GATES: gates, EXECUTED: (gates >= 0.5).to(gates.dtype)}
    return {"student": Signals(torch.zeros(1, 2), lambda chunk: chunk, extras=extras)}


def test_the_loss_and_its_gradient_are_the_golden_numbers() -> None:
    gates = GATE_VALUES[:, None].clone().requires_grad_()
    loss, share = depth_load(gates, (gates >= 0.5).float())
    (0.01 * loss).backward()
    assert (share.item(), loss.item()) == (0.75, pytest.approx(0.43125))
    assert gates.grad is not None
    assert gates.grad[:, 0].tolist() == pytest.approx([0.001875] * 4)  # of the skipped token too


def test_the_gradient_of_a_logit_is_that_of_finite_differences() -> None:
    logits = torch.randn(6, 2).double().requires_grad_()

    def compute(x: Tensor) -> Tensor:
        gates = x.sigmoid()
        return depth_load(gates, (gates >= 0.5).double())[0]

    assert torch.autograd.gradcheck(compute, (logits,))
    (gradient,) = torch.autograd.grad(compute(logits), logits)
    g = logits.detach().sigmoid()
    torch.testing.assert_close(gradient, (g >= 0.5).double().mean(0) * g * (1 - g) / 6)


def test_layers_add_up_and_a_target_stops_the_push() -> None:
    gates = torch.stack([GATE_VALUES, torch.full((4,), 0.4)], 1).requires_grad_()
    terms = DepthLoad()(signals(gates), {}, {})
    assert terms["load"].item() == pytest.approx(0.43125)
    assert terms["load_share"].item() == pytest.approx(0.375)
    low, high = (DepthLoad(target=target)(signals(gates), {}, {})["load"] for target in (0.3, 0.4))
    assert torch.equal(low, terms["load"])
    high.backward()
    assert (high.item(), gates.grad.abs().sum().item()) == (0.0, 0.0)


def gated_student() -> Backbone:
    layers = (replace(PLAIN, depth=Depth()), PLAIN)
    backbone = Backbone(Blueprint(100, 16, layers, context=64))
    init_weights(backbone, std=0.3, rng=torch.Generator().manual_seed(2))
    return backbone


def test_steps_lower_the_load_the_more_the_larger_its_weight() -> None:
    batch, shares = batch_of(9, 8, 12), []
    batch["input_ids"] = batch["input_ids"] % 100
    batch["labels"] = torch.where(batch["labels"] < 0, batch["labels"], batch["input_ids"])
    for weight in (0.0, 0.5, 5.0):
        student = export_model(gated_student())
        module = TrainingModule(student, ObjectiveConfig(name=f"cross_entropy+{weight}*load").build())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(25):
            optimizer.zero_grad()
            output = module(**batch)
            output["loss"].backward()
            optimizer.step()
        shares.append(dict(zip(module.term_names, output["sums"].tolist(), strict=True))["load_share"])
    assert shares[0] > shares[1] > shares[2]


def test_what_cannot_be_pushed_is_refused() -> None:
    with pytest.raises(UsageError, match="target is 1"):
        ObjectiveConfig(name="cross_entropy+0.01*load:target=1").build()
    with pytest.raises(UnsupportedModel, match="convert --to depths"):
        DepthLoad()({"student": Signals(torch.zeros(1, 2), lambda chunk: chunk)}, {}, batch_of(4))
