"""Gates that start open change no bit of a model; closed ones scale what their layer adds; options are checked."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.models.small import SMALL
from tests.transforms.small import build, packed
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from potstill.core.depth import Depth
from potstill.core.errors import UsageError
from potstill.core.types import Batch
from potstill.evaluate.size import count_state_bytes, forward_flops
from potstill.models.backbone import Backbone
from potstill.models.depth_loads import measure_loads, record_loads
from potstill.models.families.registry import export_model, import_model
from potstill.models.saving import round_weights
from potstill.transforms.apply import apply_transform
from potstill.transforms.convert.to_mixture_of_depths import ToMixtureOfDepths
from potstill.transforms.drop_layers import DropLayers
from potstill.transforms.importance import measure_importance, next_token_loss
from potstill.transforms.narrow import select_units


def logits(model: Backbone, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.head().logits(model(batch["input_ids"], batch["position_ids"])[0])


@pytest.mark.parametrize("bias", [3.0, 0.4, 0.0])
def test_open_gates_preserve_every_bit_of_every_kind(model: Backbone, bias: float) -> None:
    gated, batch = apply_transform(ToMixtureOfDepths(bias=bias), model), packed(7, 5)
    assert [layer.depth is not None for layer in gated.blueprint.layers] == [False, True, False]
    assert torch.equal(logits(gated, batch), logits(model, batch))
    closed = apply_transform(ToMixtureOfDepths(bias=bias, open=False), model)
    assert not torch.equal(logits(closed, batch), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_still_computes_what_the_original_did(dtype: torch.dtype, tmp_path: Path) -> None:
    original = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    gated = export_model(apply_transform(ToMixtureOfDepths(bias=1.1), import_model(original)), original)
    round_weights(gated, dtype)
    gated.to(dtype).save_pretrained(tmp_path)
    again, batch = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval(), packed(9, 4, vocabulary=90)
    assert torch.equal(logits(import_model(again), batch), logits(import_model(original.to(dtype)), batch))


def test_gates_that_start_partly_closed_scale_what_the_layer_adds(llama: Backbone) -> None:
    gated = apply_transform(ToMixtureOfDepths(layers="0", open=False, bias=1.0), llama)
    x, places = torch.randn(1, 6, 16), llama._make_positions(torch.arange(6)[None], None, None)
    plain, scaled = (model.layers[0](x, places)[0] - x for model in (llama, gated))
    torch.testing.assert_close(scaled, plain * torch.tensor(1.0).sigmoid())


def test_a_gated_model_is_cut_in_width_and_depth(llama: Backbone, batches: list[Batch]) -> None:
    gated = apply_transform(ToMixtureOfDepths(layers="0-2", bias=0.1), llama)
    with torch.no_grad():
        for layer in (0, 2):
            gated.layers[layer].depth.gate.weight.normal_()
    assert all(0 < load < 1 for load in measure_loads(export_model(gated), batches))
    scores = measure_importance(gated, batches, next_token_loss)
    narrow = apply_transform(select_units(scores, hidden=12, ffn=8), gated)
    assert narrow.layers[0].depth.gate.weight.shape == (1, 12)
    shallow = apply_transform(DropLayers((0, 1)), narrow)
    assert [layer.depth is not None for layer in shallow.blueprint.layers] == [True, False]
    assert next_token_loss(shallow, batches[0]).isfinite()


def test_coordinates_that_are_0_everywhere_are_cut_without_a_change(llama: Backbone, batches: list[Batch]) -> None:
    gated = apply_transform(ToMixtureOfDepths(layers="0-1-2", bias=0.1), llama)
    with torch.no_grad():
        for block in gated.layers:
            block.depth.gate.weight.normal_()
            block.mixer.o.weight[12:] = block.ffn.down.weight[12:] = 0
        gated.embed.weight[:, 12:] = 0
    scores = measure_importance(gated, batches, next_token_loss)
    narrow = apply_transform(select_units(scores, hidden=12), gated)
    torch.testing.assert_close(logits(narrow, batches[0]), logits(gated, batches[0]), rtol=0, atol=1e-3)
    loads = [measure_loads(export_model(model), batches) for model in (gated, narrow)]
    assert loads[0] == loads[1]
    assert 0 < sum(loads[0]) < 3


def test_measured_loads_stand_in_the_blueprint_and_its_costs(llama: Backbone, batches: list[Batch]) -> None:
    model = export_model(apply_transform(ToMixtureOfDepths(layers="0-2"), llama))
    with torch.no_grad():
        model.backbone.layers[2].depth.gate.bias.fill_(-1)
    before = model.backbone.blueprint
    record_loads(model, batches)
    after = model.config.to_blueprint()
    assert after == model.backbone.blueprint
    assert [layer.depth and layer.depth.load for layer in after.layers] == [1.0, None, 0.0]
    assert forward_flops(after, 50.0).total < forward_flops(before, 50.0).total
    assert count_state_bytes(after, 50) == count_state_bytes(before, 50) * 2 // 3
    record_loads(LlamaForCausalLM(LlamaConfig(**SMALL)), iter(()))  # no gates, nothing to measure


def test_an_expected_load_is_planned_with(llama: Backbone) -> None:
    half = ToMixtureOfDepths(layers="1", load=0.5, threshold=0.4).blueprint(llama.blueprint)
    assert half.layers[1].depth == Depth(threshold=0.4, unit_logit=1.0, load=0.5)
    assert replace(half.layers[1], depth=None) == llama.blueprint.layers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold is 1"),
        ({"bias": -1.0}, "start at 0.27, below the threshold 0.5"),
        ({"load": 1.2}, "load is 1.2"),
        ({"layers": "1-3"}, "there is no layer 3"),
        ({"layers": "all"}, "no list of layers"),
    ],
)
def test_options_that_cannot_be_are_refused(llama: Backbone, options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ToMixtureOfDepths(**options).blueprint(llama.blueprint)


def test_a_second_conversion_and_a_single_layer_are_refused(llama: Backbone) -> None:
    with pytest.raises(UsageError, match="gates already"):
        ToMixtureOfDepths(layers="0").blueprint(ToMixtureOfDepths().blueprint(llama.blueprint))
    with pytest.raises(UsageError, match="layers=0"):
        ToMixtureOfDepths().blueprint(build("llama tied", layers=1).blueprint)
