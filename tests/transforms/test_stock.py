"""What is pruned is saved as the stock family it came from, and opens again with the same logits."""

from pathlib import Path

import pytest
import torch
from tests.transforms.small import build
from transformers import AutoModelForCausalLM

from potstill.core.types import Batch
from potstill.models.families.registry import export_model, import_model
from potstill.models.signals import is_head_reproduced
from potstill.transforms.apply import apply_transform
from potstill.transforms.drop_layers import DropLayers
from potstill.transforms.fit import count_parameters, fit_shape
from potstill.transforms.importance import measure_importance, next_token_loss
from potstill.transforms.narrow import select_units

FAMILY = {
    "llama tied": "llama",
    "qwen2 untied": "qwen2",
    "qwen3 tied": "qwen3",
    "llama with every bias": "llama",
    "gemma3": "gemma3_text",
}


@pytest.mark.parametrize(("kind", "hidden"), [*((kind, 12) for kind in FAMILY if kind != "gemma3"), ("gemma3", None)])
@torch.no_grad()
def test_a_pruned_model_reloads_as_a_stock_model_with_equal_logits(
    kind: str, hidden: int | None, batches: list[Batch], tmp_path: Path
) -> None:
    model = build(kind, hidden=24)
    found = measure_importance(model, batches, next_token_loss)
    narrow = apply_transform(select_units(found, kv_heads=2, ffn=6, hidden=hidden), model)
    pruned = apply_transform(DropLayers((0, 2)), narrow)
    export_model(pruned).save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert stock.config.model_type == FAMILY[kind]
    assert sum(weight.numel() for weight in stock.parameters()) == count_parameters(pruned.blueprint)
    ids = torch.arange(20)[None]
    logits = pruned.head().logits(pruned(ids, ids)[0])
    torch.testing.assert_close(logits, stock(ids).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_gemma_cut_in_width_keeps_its_embedding_scale_and_is_saved_as_our_own(
    batches: list[Batch], tmp_path: Path
) -> None:
    model = build("gemma3", hidden=24)
    narrow = apply_transform(select_units(measure_importance(model, batches, next_token_loss), hidden=12), model)
    assert narrow.blueprint.embedding_scale == 24**0.5
    export_model(narrow).save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert ours.config.model_type == "potstill"
    assert import_model(ours).blueprint == narrow.blueprint
    assert is_head_reproduced(ours)  # with its soft-cap
    ids = torch.arange(20)[None]
    assert torch.equal(ours(ids).logits[0], narrow.head().logits(narrow(ids, ids)[0]))


@torch.no_grad()
def test_a_budget_becomes_a_stock_model_of_that_size(batches: list[Batch]) -> None:
    model = build("llama tied", layers=6, hidden=96)
    shape = fit_shape(model.blueprint, keep=0.6)
    found = measure_importance(model, batches, next_token_loss)
    narrow = select_units(found, kv_heads=shape["kv_heads"], ffn=shape["ffn"], hidden=shape["hidden"])
    pruned = apply_transform(DropLayers(tuple(range(shape["layers"]))), apply_transform(narrow, model))
    stock = export_model(pruned)
    assert stock.config.model_type == "llama"
    assert stock.num_parameters() / count_parameters(model.blueprint) == pytest.approx(0.6, rel=0.02)
