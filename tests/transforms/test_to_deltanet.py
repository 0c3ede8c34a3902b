"""Attention becomes DeltaNet: what starts from the trained weights, what matching improves, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from potstill.core.blueprint import Blueprint, Layer
from potstill.core.errors import UsageError
from potstill.core.types import Batch
from potstill.layers.ffn.swiglu import SwiGLU
from potstill.layers.linear.ternary import Ternary
from potstill.layers.mixers.attention import Attention
from potstill.layers.mixers.delta_net import DeltaNet
from potstill.models.backbone import Backbone, init_weights
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.registry import parse_conversion

OLD = Blueprint(40, 24, (Layer(Attention(6, 3, 4, qkv_bias=True), SwiGLU(16)),) * 4, context=64)
GATED = pytest.mark.parametrize("gated", ["true", "false"])


def network(blueprint: Blueprint = OLD) -> Backbone:
    model = Backbone(blueprint).train()
    init_weights(model, std=0.3, rng=torch.Generator().manual_seed(0))
    return model


def text(rows: int = 4, length: int = 32) -> Batch:
    """Rows of two documents each; tokens repeat, so that there is something to remember."""
    ids = torch.randint(20, (rows, length // 2)).repeat_interleave(2, 1)
    positions = torch.arange(length).expand(rows, -1) % 20
    return {"input_ids": ids, "position_ids": positions, "documents": (positions == 0).cumsum(1) - 1}


@GATED
def test_every_fourth_layer_keeps_its_attention_and_the_others_start_from_theirs(gated: str) -> None:
    model = network()
    converted = apply_transform(parse_conversion(f"deltanet:gated={gated}"), model)
    assert [layer.mixer.kind_name for layer in converted.blueprint.layers] == ["delta_net"] * 3 + ["attention"]
    assert converted.blueprint.layers[0].mixer == DeltaNet(6, 6, 4, 4, gated=gated == "true")
    old, new = model.layers[1].mixer, converted.layers[1].mixer
    assert torch.equal(new.q.weight, old.q.weight)
    assert torch.equal(new.o.weight, old.o.weight)
    heads = old.k.weight.unflatten(0, (3, 4))
    assert torch.equal(new.k.weight.unflatten(0, (6, 4)), heads[[0, 0, 1, 1, 2, 2]])
    assert new.v_conv.weight.tolist() == [[0, 0, 0, 1]] * 24
    assert not new.rate.weight.any()
    if gated == "true":
        torch.testing.assert_close(softplus(new.dt_bias)[[0, -1]], torch.tensor([1e-3, 0.1]))
    assert torch.equal(converted.layers[3].mixer.k.weight, model.layers[3].mixer.k.weight)
    assert torch.equal(converted.layers[1].ffn.up.weight, model.layers[1].ffn.up.weight)


@GATED
def test_the_fit_and_the_steps_each_lower_the_error_of_a_layer(gated: str) -> None:
    model, batches = network(replace(OLD, layers=OLD.layers[:2])), [text(16), text(16)]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    conversion = parse_conversion(f"deltanet:gated={gated},layers=1,passes=2,learning_rate=0.02")
    converted, facts = conversion.convert(model, batches)
    errors = facts["matching"]["relative_errors"]["1"]
    assert errors["start"] > errors["fit"] > 1.2 * errors["training"]
    assert facts["matching"]["measured_tokens"] == 4 * 32
    assert model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert losses(model, converted, batches[0]) < losses(model, apply_transform(conversion, model), batches[0])


def test_autocast_sees_each_step() -> None:
    model, conversion = network(replace(OLD, layers=OLD.layers[:2])), parse_conversion("deltanet:layers=0,passes=1")
    with torch.autocast("cpu", torch.bfloat16):
        _, facts = conversion.convert(model, [text(16)])
    errors = facts["matching"]["relative_errors"]["0"]
    assert len({*errors.values()}) == 3


@torch.no_grad()
def losses(teacher: Backbone, student: Backbone, batch: Batch) -> Tensor:
    """Cross-entropy of the student under the teacher's distribution."""
    rows = [net(batch["input_ids"], batch["position_ids"]).flatten(0, 1) for net in (teacher, student)]
    return cross_entropy(student.head().logits(rows[1]), teacher.head().logits(rows[0]).softmax(-1))


def test_a_single_row_serves_for_both() -> None:
    _, facts = parse_conversion("deltanet:attention_every=2").convert(network(), [text(1)])
    assert list(facts["matching"]["relative_errors"]) == ["0", "2"]


HYBRID = replace(OLD, layers=(replace(OLD.layers[0], mixer=DeltaNet(2, 2, 4, 4)), *OLD.layers[1:]))


@pytest.mark.parametrize(
    ("options", "blueprint", "message"),
    [
        ("attention_every=1", OLD, "converts no layer; choose 0, 2 or more"),
        ("passes=-1", OLD, "passes is -1"),
        ("learning_rate=0", OLD, "learning_rate is 0"),
        ("layers=4", OLD, "there is no layer 4"),
        ("layers=x", OLD, "no list of layers"),
        ("", HYBRID, "DeltaNet layers already"),
        ("layers=0-1", HYBRID, "layer 0 is DeltaNet already"),
        ("", replace(OLD, layers=(replace(OLD.layers[0], linear=Ternary()),) * 4), "ternary matrices"),
        (
            "",
            HYBRID.change_layers(lambda i: True, lambda layer: replace(layer, mixer=HYBRID.layers[0].mixer)),
            "already",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_sentence(options: str, blueprint: Blueprint, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_conversion(f"deltanet:{options}").blueprint(blueprint)


def test_further_layers_of_a_hybrid_can_be_named() -> None:
    kinds = [layer.mixer.kind_name for layer in parse_conversion("deltanet:layers=2").blueprint(HYBRID).layers]
    assert kinds == ["delta_net", "attention", "delta_net", "attention"]
