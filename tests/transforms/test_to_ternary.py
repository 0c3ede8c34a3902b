"""Ternary, packed and MatMul-free models from trained ones: what they compute, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from tests.transforms.small import KINDS, build, packed
from torch import Tensor

from potstill.core.errors import UsageError
from potstill.layers.linear.ternary import PackedTernary, Ternary, set_strength
from potstill.layers.mixers.mlgru import MLGRU
from potstill.models.backbone import Backbone
from potstill.ops.ternary import quantize_weight
from potstill.transforms.convert.registry import parse_conversion

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def convert(model: Backbone, to: str, *lengths: int) -> tuple[Backbone, dict]:
    return parse_conversion(to).convert(model, [packed(*lengths)] if lengths else [])


@torch.no_grad()
def logits(model: Backbone) -> Tensor:
    ids = torch.arange(11)[None]
    return model.head().logits(model(ids, ids)[0])


@torch.no_grad()
def change_matrices(model: Backbone, change: Callable[[Tensor], Tensor]) -> None:
    for name, weight in model.named_parameters():
        if name.startswith("layers.") and weight.ndim == 2:
            weight.copy_(change(weight))


@EVERY_KIND
def test_with_activations_as_they_are_it_is_the_model_with_rounded_matrices(kind: str) -> None:
    model = build(kind)
    ternary, facts = convert(model, "ternary:activations=false")
    assert ternary.blueprint.layers[0].linear == Ternary(activations=False)
    before = logits(model)
    change_matrices(model, lambda weight: quantize_weight(weight).dequantize())
    torch.testing.assert_close(logits(ternary), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert 0.4 < facts["weight_error"] < 0.6  # 0.51 of Gaussian weights


def test_the_trained_numbers_stay_and_a_ternary_model_is_the_model_at_strength_0() -> None:
    model = build("llama tied")
    ternary, _ = convert(model, "ternary")
    assert {name: weight.sum() for name, weight in ternary.state_dict().items()} == {
        name: weight.sum() for name, weight in model.state_dict().items()
    }
    set_strength(ternary, 0.0)
    torch.testing.assert_close(logits(ternary), logits(model), rtol=1e-4, atol=1e-4)


@EVERY_KIND
@pytest.mark.parametrize("options", ["", ":norm=true", ":activations=false,layers=0-2"])
def test_packing_changes_no_bit_of_the_logits(kind: str, options: str) -> None:
    ternary, _ = convert(build(kind), f"ternary{options}", 6, 7)
    small, _ = convert(ternary, "packed_ternary")
    assert torch.equal(logits(small), logits(ternary))
    kinds = [type(layer.linear) for layer in small.blueprint.layers]
    assert kinds.count(PackedTernary) == (2 if "layers" in options else 3)


@torch.no_grad()
def test_a_norm_starts_from_the_mean_size_of_its_input() -> None:
    model, batch, inputs = build("qwen3 tied"), packed(6, 7), []
    ternary, facts = parse_conversion("ternary:norm=true").convert(model, [batch])
    model.layers[0].ffn.down.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    model(batch["input_ids"], batch["position_ids"])
    sizes = inputs[0].square().mean(-1).sqrt()
    torch.testing.assert_close(ternary.layers[0].ffn.down.norm.weight, sizes.mean().expand(10))
    assert 0 < facts["input_error"] < 1


@pytest.mark.parametrize("kind", ["llama tied", "qwen3 tied", "gemma3"])
def test_a_recurrence_starts_from_values_and_output(kind: str) -> None:
    model = build(kind)
    recurrent, _ = convert(model, "mlgru")
    assert [layer.mixer for layer in recurrent.blueprint.layers] == [MLGRU(24, i / 3) for i in range(3)]
    old, new = model.layers[1].mixer, recurrent.layers[1].mixer
    repeats = old.facts.heads // old.facts.kv_heads
    heads = old.v.weight.unflatten(0, (-1, old.facts.head_dim)).repeat_interleave(repeats, 0)
    assert torch.equal(new.candidate.weight, heads.flatten(0, 1))
    assert torch.equal(new.o.weight, old.o.weight)
    assert logits(convert(convert(recurrent, "ternary:norm=true", 6)[0], "packed_ternary")[0]).isfinite().all()
    hybrid, _ = convert(model, "mlgru:layers=1,bounds=false")
    assert hybrid.blueprint.layers[1].mixer == MLGRU(24)
    assert hybrid.blueprint.layers[0] == model.blueprint.layers[0]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (["ternary", "ternary"], "layer 0 has ternary matrices already"),
        (["ternary:layers=1", "ternary:layers=1"], "layer 1 has ternary"),
        (["ternary:layers=3"], "there is no layer 3"),
        (["packed_ternary"], "make them with --to ternary"),
        (["ternary", "packed_ternary", "packed_ternary"], "packed already"),
        (["ternary", "packed_ternary", "ternary"], "packed_ternary matrices already"),
        (["ternary", "mlgru"], "convert to mlgru first"),
        (["mlgru", "mlgru"], "has mlgru and no attention"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(steps: list[str], message: str) -> None:
    model = build("llama tied")
    for step in steps[:-1]:
        model, _ = convert(model, step)
    with pytest.raises(UsageError, match=message):
        convert(model, steps[-1])


def test_attention_with_biases_is_no_recurrence() -> None:
    with pytest.raises(UsageError, match="has biases"):
        convert(build("llama with every bias"), "mlgru")


@torch.no_grad()
def test_a_second_conversion_leaves_the_layers_of_the_first_alone() -> None:
    first, _ = convert(build("llama tied"), "ternary:layers=0,norm=true", 6, 5)
    gain = first.layers[0].mixer.q.norm.weight.clone()
    second, facts = convert(first, "ternary:layers=1-2,norm=true", 7, 4)
    assert torch.equal(second.layers[0].mixer.q.norm.weight, gain)
    assert facts["input_error"] > 0
    plain, _ = convert(build("llama tied"), "ternary:layers=0")
    convert(plain, "ternary:layers=1-2,norm=true", 7, 4)
