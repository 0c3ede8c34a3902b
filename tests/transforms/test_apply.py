"""A transform makes a new model and leaves the old one alone."""

from dataclasses import dataclass, replace

import pytest
import torch
from tests.transforms.small import digest

from potstill.core.blueprint import Blueprint, weight_shapes
from potstill.core.types import Weights
from potstill.models.backbone import Backbone
from potstill.transforms.apply import Transform, apply_transform
from potstill.transforms.drop_layers import DropLayers
from potstill.transforms.narrow import Narrow

EVERY = {
    "narrow": Narrow(
        units={"kv_heads": ((0, 2),) * 3, "ffn": ((1, 2, 5),) * 3}, hidden=tuple(range(3, 15)), gain={"norm": 1.5}
    ),
    "drop_layers": DropLayers((0, 2)),
}


@dataclass(frozen=True)
class Halved:
    """A faulty transform: its blueprint is narrower, its weights are not."""

    def blueprint(self, old: Blueprint) -> Blueprint:
        return replace(old, hidden=old.hidden // 2)

    def weights(self, weights: Weights, old: Blueprint) -> Weights:
        return weights


@pytest.mark.parametrize("transform", EVERY.values(), ids=EVERY)
class TestEveryTransform:
    def test_leaves_the_old_model_as_it_was_and_shares_no_memory(self, transform: Transform, model: Backbone) -> None:
        before, blueprint = digest(model), model.blueprint
        new = apply_transform(transform, model)
        with torch.no_grad():
            for weight in new.parameters():
                weight.zero_()
        assert digest(model) == before
        assert model.blueprint == blueprint

    def test_makes_the_weights_its_blueprint_names(self, transform: Transform, model: Backbone) -> None:
        new = apply_transform(transform, model)
        assert {name: tuple(weight.shape) for name, weight in new.state_dict().items()} == weight_shapes(new.blueprint)

    def test_keeps_dtype_and_mode(self, transform: Transform, llama: Backbone) -> None:
        for training in (True, False):
            new = apply_transform(transform, llama.train(training).bfloat16())
            assert new.training is training
            assert {weight.dtype for weight in new.parameters()} == {torch.bfloat16}

    def test_keeps_a_tied_head_tied(self, transform: Transform, llama: Backbone) -> None:
        new = apply_transform(transform, llama)
        assert new.head().weight is new.embed.weight
        assert "head.weight" not in new.state_dict()

    def test_makes_a_model_that_learns(self, transform: Transform, llama: Backbone) -> None:
        new = apply_transform(transform, llama)
        ids = torch.arange(5)[None]
        new(ids, ids).sum().backward()
        assert all(weight.requires_grad and weight.grad is not None for weight in new.parameters())


def test_halves_that_disagree_are_refused(llama: Backbone) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        apply_transform(Halved(), llama)
