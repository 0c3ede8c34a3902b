"""Losses of answers that share a prompt are those of answers with a prompt each, in value and every gradient."""

import copy

import pytest
import torch
from tests.models.shared import make_pack, shared_packs
from tests.models.test_shared_prompts import model_of
from tests.objectives.test_invariants import assert_equal, gradients, other
from tests.objectives.test_preference import build
from torch import Tensor
from transformers import LlamaForCausalLM

from potstill.core.types import BASELINE, CHOSEN, IGNORE, REJECTED
from potstill.data.packing import Pack, collate
from potstill.data.shared_prompts import build_group
from potstill.data.token_dataset import TokenizedDocument
from potstill.models import signals
from potstill.ops.layout import repeat_prompts, unpack
from potstill.train.training_module import TrainingModule

LOSSES = ("dpo:smoothing=0.2,nll=0.3,beta=0.5", "ipo", "simpo:nll=1", "orpo", "kto")


def label_packs() -> list[Pack]:
    """A desirable and an undesirable answer, each beside the answer to another prompt."""
    packs = []
    for number, side in enumerate((CHOSEN, REJECTED)):
        prompt = list(range(20 + number, 26 + number))
        answers = [[*range(40, 44 + number)], [50, 51, 52]]
        wholes = [TokenizedDocument([*prompt, *answer], [IGNORE] * 6 + answer) for answer in answers]
        packs.append(make_pack(build_group(wholes, (side, BASELINE), group=0)))
    return packs


def packs_for(name: str) -> list[Pack]:
    return label_packs() if name == "kto" else shared_packs()


def module_of(model: LlamaForCausalLM, name: str, *, is_padded: bool = False) -> TrainingModule:
    objective = build(name)
    frozen = {"reference": other(model)} if name.partition(":")[0] in ("dpo", "ipo", "kto") else {}
    module = TrainingModule(copy.deepcopy(model), objective, frozen=frozen)
    for network in (module.student, *module._frozen_models) if is_padded else ():
        signals._probes[network] = signals.ModelProbe(
            has_known_head=True, supports_packing=False, takes_position_ids=True
        )
    return module


@pytest.mark.parametrize("name", LOSSES)
def test_shared_repeated_padded_and_divided_batches_have_one_gradient(name: str, tiny_llama: LlamaForCausalLM) -> None:
    module, packs = module_of(tiny_llama.double(), name), packs_for(name)
    batch = collate(packs)
    whole = repeat_prompts(batch)
    assert whole["input_ids"].numel() > batch["input_ids"].numel()
    losses = [module(**form)["loss"] for form in (batch, whole, unpack(batch))]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)
    together, counts = gradients(module, batch), module.counts(batch)
    assert_equal(gradients(module, whole), together)
    divided: dict[str, Tensor] = {}
    for pack in packs:
        for key, gradient in gradients(module, collate([pack]), counts).items():
            divided[key] = divided.get(key, torch.zeros_like(gradient)) + gradient
    assert_equal(divided, together)
    assert_equal(gradients(module_of(tiny_llama, name, is_padded=True), batch), together)


@pytest.mark.parametrize("name", ["delta_net", "gpt_oss"])
def test_a_network_that_cannot_share_has_the_loss_of_repeated_prompts(name: str) -> None:
    batch, model = collate(shared_packs()), model_of(name)
    module = TrainingModule(model, build("orpo"))
    assert not signals.probe_model(model).supports_shared_prompts
    assert_equal(gradients(module, batch), gradients(module, repeat_prompts(batch)))
