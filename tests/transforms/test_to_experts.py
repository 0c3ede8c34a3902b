"""Upcycling keeps the function where it says so, lets the router learn, and lets equal experts part."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from potstill.core.blueprint import Blueprint, Layer, weight_shapes
from potstill.core.errors import UsageError
from potstill.core.types import Batch
from potstill.evaluate.size import forward_flops
from potstill.layers.ffn.experts import Experts
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.mixers.attention import Attention
from potstill.models.backbone import Backbone, init_weights
from potstill.models.families.registry import find_family
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.to_experts import ToExperts
from potstill.transforms.importance import next_token_loss

LAYER = Layer(Attention(2, 1, 8), SwiGLU(20))
DENSE = Blueprint(40, 16, (LAYER,) * 4, context=32)


def network() -> Backbone:
    model = Backbone(DENSE).double().eval()
    init_weights(model, std=0.4)
    return model


def batch_of(tokens: int = 24) -> Batch:
    ids = torch.randint(40, (2, tokens))
    positions = torch.arange(tokens).expand(2, -1)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(positions == 0, -100),
        "position_ids": positions,
        "documents": torch.arange(2)[:, None].expand(-1, tokens),
    }


def router_gradients(model: Backbone, batch: Batch) -> Tensor:
    routers = [weight for name, weight in model.named_parameters() if "router" in name]
    return torch.cat([g.flatten() for g in torch.autograd.grad(next_token_loss(model, batch), routers)])


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("weighting", ["auto", "normalized", "straight_through"])
@torch.no_grad()
def test_the_function_is_kept(top_k: int, weighting: str) -> None:
    model, batch = network(), batch_of()
    converted = apply_transform(ToExperts(top_k=top_k, weighting=weighting), model)
    x = (batch["input_ids"], batch["position_ids"])
    torch.testing.assert_close(converted(*x), model(*x), rtol=0, atol=1e-10)
    noisy = apply_transform(ToExperts(top_k=top_k, weighting=weighting, noise=0.1), model)
    assert (noisy(*x) - model(*x)).abs().max() > 1e-3


@torch.no_grad()
def test_probabilities_as_weights_change_the_function() -> None:
    model, batch = network(), batch_of()
    x = (batch["input_ids"], batch["position_ids"])
    assert (apply_transform(ToExperts(weighting="softmax"), model)(*x) - model(*x)).abs().max() > 1e-2


def test_a_straight_through_router_learns_at_once_and_a_normalized_one_when_experts_differ() -> None:
    model, batch = network(), batch_of()
    assert router_gradients(apply_transform(ToExperts(), model), batch).abs().max() > 1e-6
    pair = apply_transform(ToExperts(top_k=2, pyramid=False), model)
    assert router_gradients(pair, batch).abs().max() < 1e-12
    step(pair, batch)
    assert router_gradients(pair, batch).abs().max() > 1e-6
    single = apply_transform(ToExperts(weighting="normalized"), model)
    step(single, batch)
    assert router_gradients(single, batch).abs().max() < 1e-12


@pytest.mark.parametrize("top_k", [1, 2])
def test_equal_experts_part_in_the_first_step(top_k: int) -> None:
    converted, batch = apply_transform(ToExperts(top_k=top_k), network()), batch_of()
    step(converted, batch)
    weights = [expert.up.weight for expert in converted.layers[3].ffn.experts]
    assert all((weights[0] - other).abs().max() > 1e-6 for other in weights[1:])


def step(model: Backbone, batch: Batch) -> None:
    weights = list(model.parameters())
    gradients = torch.autograd.grad(next_token_loss(model, batch), weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= 0.1 * gradient


def test_the_parameters_of_minimix_are_those_of_its_config() -> None:
    layer = Layer(Attention(24, 24, 128), SwiGLU(8192))
    minima = Blueprint(49216, 3072, (layer,) * 24)
    minimix = ToExperts().blueprint(minima)
    counts = [layer.ffn.count for layer in minimix.layers]
    assert counts == [2] * 6 + [4] * 18
    sizes = {name: torch.Size(shape).numel() for name, shape in weight_shapes(minimix).items()}
    matrices = sum(size for name, size in sizes.items() if "norm" not in name and "router" not in name)
    assert matrices == 7_550_140_416
    routers = 3072 * sum(counts)
    assert forward_flops(minimix, 1.0).blocks == forward_flops(minima, 1.0).blocks + 2 * routers


def test_layers_counts_and_top_k_are_those_that_were_chosen() -> None:
    some = ToExperts(layers="1-3", counts="3-2", top_k=3).blueprint(DENSE)
    assert [layer.ffn for layer in some.layers[::2]] == [LAYER.ffn] * 2
    assert some.layers[1].ffn == Experts(LAYER.ffn, 3, 3, "normalized")
    assert some.layers[3].ffn == Experts(LAYER.ffn, 2, 2, "normalized")  # a token cannot have three of two
    single = ToExperts(experts=3, pyramid=True).blueprint(DENSE)
    assert [layer.ffn.count for layer in single.layers] == [1, 3, 3, 3]


def test_an_even_number_of_experts_in_all_layers_is_a_stock_model() -> None:
    assert find_family(ToExperts(top_k=2, pyramid=False).blueprint(DENSE)).name == "mixtral"
    assert find_family(ToExperts(top_k=2).blueprint(DENSE)) is None


def test_the_seed_alone_decides_the_routers() -> None:
    model = network()
    first, again, other = (apply_transform(ToExperts(seed=seed), model).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {n for n in first if "router" in n}
    assert first["layers.3.ffn.router.weight"].std() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "0-4"}, "there is no layer 4"),
        ({"counts": "2-2"}, "2 counts for 4 layers"),
        ({"counts": "many"}, "no list of numbers"),
        ({"counts": "2-0-2-2"}, "at least 1"),
        ({"experts": 32}, "20 neurons, fewer than 32 experts"),
        ({"experts": 1}, "at least 2 experts"),
        ({"top_k": 0}, "at least 1"),
        ({"router_std": 0.0}, "equal experts stay equal"),
        ({"noise": -1.0}, "at least 0"),
        ({"weighting": "soft"}, "choose one of auto, softmax"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ToExperts(**options).blueprint(DENSE)


def test_what_has_experts_is_not_converted_again() -> None:
    once = ToExperts(layers="0").blueprint(DENSE)
    with pytest.raises(UsageError, match="layer 0 has experts already; name other layers"):
        ToExperts().blueprint(once)
    assert ToExperts(layers="1").blueprint(once).layers[0] == once.layers[0]
    assert replace(once, layers=once.layers[1:]) == replace(DENSE, layers=DENSE.layers[1:])
