"""The frozen reference: equal to the policy at the start, and to itself at the end."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.stages.world import saved
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.types import Batch, Needs, supervised_positions
from potstill.data.packing import collate
from potstill.models.load import load_model
from potstill.models.signals import compute_signals
from potstill.objectives.row_terms import compute_target_log_probs
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.prepare import AlignRun, prepare
from potstill.stages.align.references import Network
from potstill.stages.align.run import align
from potstill.train.dropout import disable_dropout
from potstill.train.frozen_view import FrozenView
from potstill.train.run import train


def first_batch(run: AlignRun) -> Batch:
    return collate([run.packs[0]])


def loss_of(run: AlignRun) -> float:
    return float(run.module.train()(**first_batch(run))["loss"].detach())


def log_probs(network: Network, batch: Batch) -> Tensor:
    positions, targets, _ = supervised_positions(batch)
    with torch.no_grad():
        is_model = isinstance(network, torch.nn.Module)
        signals = (
            compute_signals(network, batch, Needs(positions)) if is_model else network.signals(batch, Needs(positions))
        )
        return compute_target_log_probs(signals, targets)


@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_dpo_begins_at_log_2(config: AlignConfig, dtype: str, tolerance: float, lora: int) -> None:
    run = prepare(replace(config, dtype=dtype, lora=lora))
    assert loss_of(run) == pytest.approx(math.log(2), abs=tolerance)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_reference_is_neither_trained_nor_in_train_mode(config: AlignConfig, tmp_path: Path, lora: int) -> None:
    run = prepare(replace(config, lora=lora))
    batch = first_batch(run)
    before = log_probs(run.module.frozen_networks["reference"], batch)
    settings = replace(config.settings, learning_rate=1e-2)
    train(run.module, run.packs, settings, tmp_path / "run", tokenizer=run.origin.tokenizer, show=False)
    reference = run.module.frozen_networks["reference"]
    assert torch.equal(log_probs(reference, batch), before)
    assert not torch.allclose(log_probs(run.module.student, batch), before, atol=1e-3)
    if isinstance(reference, torch.nn.Module):
        run.module.train()
        assert not any(module.training for module in reference.modules())
        assert not any(parameter.requires_grad for parameter in reference.parameters())
        trained = {id(parameter) for parameter in run.module.parameters()}
        assert not trained & {id(parameter) for parameter in reference.parameters()}


def test_dropout_of_the_policy_is_off_and_its_config_keeps_it(
    config: AlignConfig, tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_llama.config.attention_dropout = 0.5
    model = saved(tmp_path / "dropping", LlamaForCausalLM(tiny_llama.config), tiny_tokenizer)
    run = prepare(replace(config, model=str(model)))
    assert loss_of(run) == pytest.approx(math.log(2), abs=1e-6)
    assert run.student.config.attention_dropout == 0.5


def test_every_kind_of_dropout_is_switched_off() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.attention_dropout, self.width = torch.nn.Dropout(0.5), 0.5, 0.5

    model = torch.nn.Sequential(Layer(), torch.nn.Dropout1d(0.1))
    disable_dropout(model)
    assert (model[0].drop.p, model[0].attention_dropout, model[0].width, model[1].p) == (0.0, 0.0, 0.5, 0.0)


def test_with_lora_over_an_adapter_the_reference_is_the_merged_model(
    config: AlignConfig, teacher: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = AutoModelForCausalLM.from_pretrained(teacher)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    run = prepare(replace(config, model=str(tmp_path / "adapter"), lora=2))
    batch, reference = first_batch(run), run.module.frozen_networks["reference"]
    assert isinstance(reference, FrozenView)
    merged = log_probs(load_model(tmp_path / "adapter").model, batch)
    assert torch.allclose(log_probs(reference, batch), merged, atol=1e-5)
    assert not torch.allclose(merged, log_probs(load_model(teacher).model, batch), atol=1e-2)
    assert loss_of(run) == pytest.approx(math.log(2), abs=1e-6)


def test_a_tied_head_stays_tied_after_the_adapter_is_merged(config: AlignConfig, tmp_path: Path) -> None:
    settings = replace(config.settings, tokens=512, learning_rate=1e-2)
    result = align(replace(config, lora=2, settings=settings), tmp_path / "made", show=False)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert opened.lm_head.weight.data_ptr() == opened.model.embed_tokens.weight.data_ptr()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(opened(ids).logits, result.model(ids).logits, atol=1e-5)
    after = result.measures["made"]
    assert after.reference_kl.value > 1e-4, "the reference is the model before training, and not the merged one"
    assert result.before_training.reference_kl.value == pytest.approx(0.0, abs=1e-9)
