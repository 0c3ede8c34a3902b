"""MiniLLM's policy gradient is that of its definition by autograd, over what was sampled alone."""

from typing import Any

import pytest
import torch
from tests.train.small import some_packs, study_of
from torch import Tensor
from transformers import LlamaForCausalLM

from potstill.core.types import Batch, gold_mask, supervised_positions
from potstill.data.packing import collate
from potstill.objectives.minillm import MiniLLM
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.advantage import returns_to_go, whiten
from potstill.train.training_module import TrainingModule


def batch_of(*sampled: int) -> Batch:
    """A packed batch in which the documents of these numbers were sampled."""
    packs = some_packs()
    batch = collate([packs[0], packs[1]])
    return {**batch, "sampled": torch.isin(batch["documents"], torch.tensor(sampled))}


def definition(study: TrainingModule, batch: Batch, how: MiniLLM) -> Tensor:
    """sum of max(-A rho, -A clip(rho)), from all logits at once; rho = w exp(log q - stopped log q)."""
    positions, targets, segment = supervised_positions(batch)
    kept = ~gold_mask(batch)
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "position_ids")}
    log_q, log_p = (
        model(**inputs, use_cache=False).logits[positions].log_softmax(-1).gather(-1, targets[:, None])[kept, 0]
        for model in (study.student, study.frozen_models_by_name["teacher"])
    )
    p, q = log_p.detach().exp(), log_q.detach().exp()
    rewards = ((p / q).log() / how.scale).clamp(-100, 100)
    advantage = whiten(returns_to_go(rewards, segment[kept], discount=how.discount))
    rho = (log_q - log_q.detach()).exp() * q / (how.teacher_share * p + (1 - how.teacher_share) * q)
    return torch.maximum(-advantage * rho, -advantage * rho.clamp(1 - how.clip, 1 + how.clip)).sum()


def gradients(study: TrainingModule, loss: Tensor) -> dict[str, Tensor]:
    study.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in study.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", [MiniLLM(), MiniLLM(teacher_share=0.5, clip=0.05, discount=1.0, scale=2.0)])
def test_its_gradient_is_that_of_the_clipped_objective(how: MiniLLM, tiny_llama: LlamaForCausalLM) -> None:
    study, batch = study_of(tiny_llama.double(), objective=WeightedSum((1.0, how))), batch_of(0, 2, 3)
    counts = study.counts(batch)
    assert counts.tolist() == [int((~gold_mask(batch)).sum())]
    found = gradients(study, study(num_items_in_batch=torch.ones(1), **batch)["loss"])
    expected = gradients(study, definition(study, batch, how))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


def test_some_rows_are_clipped_and_some_are_not(tiny_llama: LlamaForCausalLM) -> None:
    study, batch = study_of(tiny_llama.double()), batch_of(0, 1, 2, 3)
    seen: list[Tensor] = []

    class Watched(MiniLLM):
        def compute_coefficients(self, *asked: Any) -> Tensor:
            seen.append(super().compute_coefficients(*asked))
            return seen[-1]

    study.objective = WeightedSum((1.0, Watched(clip=0.02)))
    study(**batch)
    assert 0 < (seen[0][~gold_mask(batch)] == 0).float().mean() < 1


def test_rows_of_the_data_have_no_part_in_it(tiny_llama: LlamaForCausalLM) -> None:
    study, batch = study_of(tiny_llama, objective=WeightedSum((1.0, MiniLLM()))), batch_of()
    assert study.counts(batch).tolist() == [0]
    found = gradients(study, study(**batch)["loss"])
    assert not any(gradient.any() for gradient in found.values())


def test_a_teacher_that_is_the_student_rewards_nothing(tiny_llama: LlamaForCausalLM) -> None:
    study, batch = study_of(tiny_llama.double(), objective=WeightedSum((1.0, MiniLLM()))), batch_of(0, 1)
    study.frozen_models_by_name["teacher"].load_state_dict(study.student.state_dict())
    found = gradients(study, study(**batch)["loss"])
    assert all(gradient.abs().max() < 1e-9 for gradient in found.values())
