"""A study: one module, frozen companions outside it, sums divided by counts."""

import copy
import gc
import weakref
from collections.abc import Mapping

import pytest
import torch
from tests.train.small import some_packs, study_of
from torch import Tensor
from transformers import LlamaForCausalLM

from potstill.core.types import IGNORE, Needs, Signals, supervised_positions
from potstill.data.packing import collate
from potstill.models.signals import compute_signals
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.row_terms import RowTerm
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops import fused
from potstill.ops.divergence import forward_kl, reverse_kl
from potstill.train.training_module import TrainingModule


def batch_of(packs: int = 3) -> Mapping[str, Tensor]:
    rows = some_packs()
    return collate([rows[i] for i in range(packs)])


def one_hot(ids: Tensor, vocabulary: int) -> Signals:
    """A teacher that is sure of `ids`, one a row."""
    logits = torch.full((len(ids), vocabulary), -1e4, dtype=torch.float64)
    logits[torch.arange(len(ids)), ids] = 0.0
    return Signals(rows=logits, logits=lambda rows: rows)


def test_a_teacher_that_is_sure_of_the_next_token_gives_cross_entropy(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    batch = batch_of()
    positions, targets, _ = supervised_positions(batch)
    student = compute_signals(tiny_llama, batch, Needs(positions))
    sure = one_hot(targets, tiny_llama.config.vocab_size)
    learnt = LogitDistillation()({"student": student}, {"teacher": sure}, batch)["distill"]
    plain = CrossEntropy()({"student": student}, {}, batch)["cross_entropy"]
    assert learnt.item() == pytest.approx(plain.item(), rel=1e-12)
    early = one_hot(batch["input_ids"][positions], tiny_llama.config.vocab_size)  # off by one: the token itself
    wrong = LogitDistillation()({"student": student}, {"teacher": early}, batch)["distill"]
    assert abs(wrong - plain) > 0.1


def test_cross_entropy_is_what_the_model_itself_says_of_each_document(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    batch, total, trained = batch_of(), 0.0, 0
    for d in batch["documents"].unique():
        mine = batch["documents"][0] == d
        ids, labels = batch["input_ids"][:, mine], batch["labels"][:, mine]
        count = int((labels[:, 1:] != IGNORE).sum())
        if count:
            total += tiny_llama(input_ids=ids, labels=labels, use_cache=False).loss.item() * count
        trained += count
    assert TrainingModule(tiny_llama, CrossEntropy())(**batch)["loss"].item() == pytest.approx(
        total / trained, rel=1e-6
    )


def test_the_teacher_answers_in_eval_mode_whoever_switches_it(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.config.attention_dropout = 0.9
    study, batch = study_of(tiny_llama, objective=LogitDistillation(divergence=reverse_kl)), batch_of()
    (teacher,) = list(study._frozen_models)
    study.eval()
    before = study(**batch)["loss"].item()
    teacher.train()
    assert study(**batch)["loss"].item() == before
    study.train()
    study.student.eval()
    assert study(**batch)["loss"].item() == before


def test_the_teacher_is_no_part_of_the_module_and_gets_no_gradient(tiny_llama: LlamaForCausalLM) -> None:
    study = study_of(tiny_llama)
    (teacher,) = list(study._frozen_models)
    for p in teacher.parameters():
        p.requires_grad_(True)  # somebody unfroze it
    study(**batch_of())["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in study.student.parameters())
    inside = {id(p) for p in study.parameters()}
    assert not inside & {id(p) for p in teacher.parameters()}
    assert study.state_dict().keys() == {f"student.{name}" for name in study.student.state_dict()}


def test_a_batch_without_a_trained_token_gives_zero_and_a_zero_gradient(tiny_llama: LlamaForCausalLM) -> None:
    study, batch = study_of(tiny_llama), dict(batch_of())
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    loss = study(**batch)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in study.student.parameters())


def test_given_counts_divide_instead_of_the_batch_s_own(tiny_llama: LlamaForCausalLM) -> None:
    study, batch = study_of(tiny_llama), batch_of()
    own = study(**batch)["loss"]
    halved = study(**batch, num_items_in_batch=2 * study.counts(batch))["loss"]
    torch.testing.assert_close(halved, own / 2)


def test_the_sharper_of_two_temperatures_is_another_loss_and_forward_is_not_reverse(
    tiny_llama: LlamaForCausalLM,
) -> None:
    tiny_llama.double()
    batch, found = batch_of(), set()
    for divergence in (forward_kl, reverse_kl):
        for temperature in (0.7, 1.0, 2.0):
            objective = LogitDistillation(divergence=divergence, temperature=temperature)
            found.add(round(study_of(tiny_llama, objective=objective)(**batch)["loss"].item(), 6))
    assert len(found) == 6


def test_a_study_that_is_gone_frees_its_models(tiny_llama: LlamaForCausalLM) -> None:
    study = TrainingModule(
        copy.deepcopy(tiny_llama), LogitDistillation(), frozen={"teacher": copy.deepcopy(tiny_llama)}
    )
    study(**batch_of(1))
    gone = [weakref.ref(study.student), *map(weakref.ref, study._frozen_models)]
    del study
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_the_head_is_computed_in_what_was_asked_for(tiny_llama: LlamaForCausalLM) -> None:
    seen: list[torch.dtype] = []

    def spy(student: Tensor, frozen: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        return student.float().logsumexp(-1)

    class Head(CrossEntropy):
        def split(self, *_: object) -> tuple[dict[str, RowTerm], dict[str, Tensor]]:
            return {self.name: RowTerm(spy)}, {}

    def note(space: Tensor, rows: Tensor, head: fused.HeadLike) -> Tensor:
        assert {space.dtype, rows.dtype} == {head[0].dtype}
        seen.append(rows.dtype)
        return logits(space, rows, head)

    with pytest.MonkeyPatch.context() as patch:
        logits = fused._write_logits
        patch.setattr(fused, "_write_logits", note)
        TrainingModule(tiny_llama, Head(), compute_dtype=torch.bfloat16)(**batch_of())["loss"].backward()
        TrainingModule(tiny_llama, Head(), compute_dtype=torch.float32)(**batch_of())["loss"].backward()
    assert seen == [torch.bfloat16, torch.float32]


def test_the_head_is_computed_once_though_terms_have_different_divisors(tiny_llama: LlamaForCausalLM) -> None:
    batch, passes = batch_of(), []
    sampled = torch.zeros_like(batch["labels"], dtype=torch.bool)
    sampled[:, 2:4] = True  # written by the student: cross-entropy counts fewer rows than the divergence
    study = study_of(tiny_llama, objective=WeightedSum((0.7, CrossEntropy()), (0.3, LogitDistillation())))
    assert len(set(study.counts({**batch, "sampled": sampled}).tolist())) == 2
    with pytest.MonkeyPatch.context() as patch:
        run = fused._compute_sums
        patch.setattr(fused, "_compute_sums", lambda *given: passes.append(1) or run(*given))
        study(**batch, sampled=sampled)["loss"].backward()
    assert len(passes) == 1
