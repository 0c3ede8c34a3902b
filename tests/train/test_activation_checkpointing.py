"""Blocks that are computed twice, or compiled, learn what plain ones learn."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import byte_tokenizer, random_llama
from tests.train.small import settings, some_packs
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM

from potstill.core.errors import UnsupportedModel
from potstill.data.packing import collate
from potstill.models.families.registry import import_model
from potstill.models.hf_causal_lm import PotstillForCausalLM
from potstill.models.hf_config import PotstillConfig
from potstill.models.signals import probe_model
from potstill.objectives.config import ObjectiveConfig
from potstill.train.activation_checkpointing import activation_checkpointing, apply_block_settings, find_blocks
from potstill.train.lora import add_adapters, get_adapter_weights
from potstill.train.training_module import TrainingModule

TWICE = settings(checkpoint_activations=True)
COMPILED = settings(compile=True)


def llama() -> nn.Module:
    return random_llama(byte_tokenizer())


def adapted() -> nn.Module:
    model: nn.Module = add_adapters(random_llama(byte_tokenizer()), 2)
    for weight in (get_adapter_weights(model) or {}).values():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def ours() -> nn.Module:
    backbone = import_model(random_llama(byte_tokenizer()))
    model = PotstillForCausalLM(PotstillConfig.from_blueprint(backbone.blueprint))
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def padded() -> nn.Module:
    """A family that mixes packed documents, so that its batches are padded."""
    return BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2))


STUDENTS: list[Callable[[], nn.Module]] = [llama, adapted, ours, padded]


def study_of(student: nn.Module) -> TrainingModule:
    teacher = random_llama(byte_tokenizer(), tied=False)
    return TrainingModule(student, ObjectiveConfig(cross_entropy=0.5).build(), frozen={"teacher": teacher}).train()


@pytest.fixture(params=STUDENTS, ids=lambda make: make.__name__)
def study(request: pytest.FixtureRequest) -> TrainingModule:
    return study_of(request.param())


def step(study: TrainingModule, packs: tuple[int, ...] = (0, 1, 2)) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some packs, and every gradient."""
    study.zero_grad()
    rows = some_packs()
    loss = study(**collate([rows[i] for i in packs]))["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in study.named_parameters() if p.grad is not None}


def saved(study: TrainingModule) -> int:
    """Bytes that a forward keeps for its backward, each storage once."""
    held: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: held.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
    ):
        _ = study(**collate([some_packs()[0]]))
    own = {weight.untyped_storage().data_ptr() for weight in study.parameters()}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in own)


def assert_same_step(study: TrainingModule, settings: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    for packs in ((0, 1, 2), (3,)):
        loss, gradients = step(study, packs)
        with apply_block_settings(study, settings, compile_backend="aot_eager"):
            again, others = step(study, packs)
        torch.testing.assert_close(again, loss, rtol=rtol, atol=atol)
        assert gradients.keys() == others.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=rtol, atol=atol)


def assert_compiles(make: Callable[[], nn.Module], twice: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    chosen = settings(compile=True, checkpoint_activations=twice)
    assert_same_step(study_of(make()), chosen, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4  # around attention, of two models
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] >= 4  # and none of them runs uncompiled


def test_blocks_computed_twice_give_the_same_bits(study: TrainingModule) -> None:
    assert probe_model(study.student).supports_packing == (not isinstance(study.student, BloomForCausalLM))
    assert_same_step(study, TWICE)


def test_blocks_computed_twice_keep_less_for_the_backward(study: TrainingModule) -> None:
    plain = saved(study)
    with apply_block_settings(study, TWICE):
        assert saved(study) < 0.6 * plain
    assert saved(study) == plain


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own look, which it hides elsewhere
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("make", [llama, adapted, padded])
def test_compiled_blocks_give_the_same_step_to_rounding(make: Callable[[], nn.Module], twice: bool) -> None:
    assert_compiles(make, twice)


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_our_own_blocks_compile_too(twice: bool) -> None:
    """In a process of its own: a compiler cannot read code whose shapes are checked as it runs, as in these tests."""
    code = f"from tests.train import {Path(__file__).stem} as t; t.assert_compiles(t.ours, {twice})"
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr


def test_compiled_blocks_keep_their_names_and_are_plain_again_afterwards() -> None:
    study = TrainingModule(llama(), ObjectiveConfig().build(), frozen={"teacher": random_llama(byte_tokenizer())})
    names = list(study.state_dict())
    inside = [*find_blocks(study.student), *find_blocks(study.frozen_models[0])]
    with apply_block_settings(study, COMPILED):
        assert list(study.state_dict()) == names
        assert all(block._compiled_call_impl is not None for block in inside)
    assert all(block._compiled_call_impl is None for block in inside)


def test_a_model_is_as_it_was_after_its_blocks_were_computed_twice() -> None:
    model = random_llama(byte_tokenizer())
    with activation_checkpointing(model):
        assert model.is_gradient_checkpointing
        assert not model.get_input_embeddings()._forward_hooks
    assert not model.is_gradient_checkpointing


def test_a_model_whose_blocks_cannot_be_computed_twice_is_refused() -> None:
    class Old(LlamaForCausalLM):
        supports_gradient_checkpointing = False

    said = "Old does not support activation checkpointing; omit --checkpoint-activations"
    old = Old(random_llama(byte_tokenizer()).config)
    with pytest.raises(UnsupportedModel, match=said), activation_checkpointing(old):
        pass


def test_the_blocks_of_a_model_are_its_layers_and_a_model_without_any_is_refused() -> None:
    assert len(find_blocks(llama())) == len(find_blocks(adapted())) == len(find_blocks(ours())) == 3
    with pytest.raises(UnsupportedModel, match="Linear has no list of blocks"):
        find_blocks(nn.Linear(2, 2))
