"""The invariants that would have caught the field's silent bugs, on a whole study: model, head, divergence, counts."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from potstill.core.types import IGNORE
from potstill.data.packing import collate
from potstill.models import signals as live
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops import layout
from potstill.ops.divergence import DIVERGENCES
from potstill.train.lora import add_adapters
from potstill.train.training_module import TrainingModule

LENGTHS = (9, 5, 14)


def batch_of(*lengths: int, prompt: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Packed documents of which all but the first `prompt` tokens are trained."""
    generator = torch.Generator().manual_seed(seed)
    packs = []
    for n in lengths:
        ids = torch.randint(3, 250, (n,), generator=generator)
        labels = torch.where(torch.arange(n) < prompt, IGNORE, ids)
        packs.append({"input_ids": ids, "labels": labels, "lengths": torch.tensor([n])})
    return collate(packs)


def other(model: LlamaForCausalLM, *, by: float = 1.2) -> LlamaForCausalLM:
    found = copy.deepcopy(model)
    with torch.no_grad():
        for p in found.parameters():
            p.mul_(by)
    return found


def gradients(study: TrainingModule, batch: Mapping[str, Tensor], counts: Tensor | None = None) -> dict[str, Tensor]:
    study.zero_grad()
    study(**batch, num_items_in_batch=counts)["loss"].backward()
    return {name: p.grad.clone() for name, p in study.named_parameters() if p.grad is not None}


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-6)  # norms of Llama are float32 inside


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name: str, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    teacher = copy.deepcopy(tiny_llama)
    study = TrainingModule(
        tiny_llama, LogitDistillation(divergence=DIVERGENCES[name], temperature=2.0), frozen={"teacher": teacher}
    )
    found = gradients(study, batch_of(*LENGTHS))
    assert abs(study(**batch_of(*LENGTHS))["loss"].item()) < 1e-12
    assert max(g.abs().max().item() for g in found.values()) < 1e-10


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("path", ["bfloat16", "padded", "lora"])
def test_no_loss_and_no_gradient_on_the_other_paths_too(path: str, name: str, tiny_llama: LlamaForCausalLM) -> None:
    teacher, student, vocabulary = copy.deepcopy(tiny_llama), tiny_llama, None
    if path == "padded":
        student.resize_token_embeddings(320, mean_resizing=False)
        vocabulary = teacher.config.vocab_size
    trained = add_adapters(student, 2, seed=1) if path == "lora" else student
    dtype = torch.bfloat16 if path == "bfloat16" else torch.float32
    objective = LogitDistillation(divergence=DIVERGENCES[name])
    study = TrainingModule(trained, objective, frozen={"teacher": teacher}, vocabulary=vocabulary, compute_dtype=dtype)
    if path == "padded":
        for model in (student, teacher):
            live._probes[model] = live.ModelProbe(has_known_head=True, supports_packing=False, takes_position_ids=True)
    found = gradients(study, batch_of(*LENGTHS))
    assert abs(study(**batch_of(*LENGTHS))["loss"].item()) < 1e-6
    assert max(g.abs().max().item() for g in found.values()) < 1e-6
    assert found


@pytest.mark.parametrize("name", ["forward_kl", "jsd:beta=0.3", "adaptive_kl", "cross_entropy"])
def test_a_pack_gives_the_loss_and_gradient_of_its_documents_alone(name: str, tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    objective = ObjectiveConfig.parse(name, cross_entropy=0.5, temperature=1.5)
    study = TrainingModule(tiny_llama, objective.build(), frozen={"teacher": other(tiny_llama)})
    whole = batch_of(*LENGTHS, prompt=3)
    counts = study.counts(whole)
    together = gradients(study, whole, counts)
    apart: dict[str, Tensor] = {}
    for d in range(len(LENGTHS)):
        mine = whole["documents"][0] == d
        alone = {k: v[:, mine] for k, v in whole.items()} | {
            "documents": torch.zeros(1, int(mine.sum()), dtype=torch.long)
        }
        for k, g in gradients(study, alone, counts).items():
            apart[k] = apart.get(k, torch.zeros_like(g)) + g
    assert_equal(together, apart)


def test_padding_a_pack_changes_neither_loss_nor_gradient(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    study = TrainingModule(tiny_llama, ObjectiveConfig().build(), frozen={"teacher": other(tiny_llama)})
    packed = batch_of(*LENGTHS)
    padded = layout.unpack(packed)
    assert padded["input_ids"].shape == (3, 14)
    assert study.counts(padded).tolist() == study.counts(packed).tolist()
    attended = copy.deepcopy(study)
    for model in (attended.student, *attended._frozen_models):
        live._probes[model] = live.ModelProbe(has_known_head=True, supports_packing=False, takes_position_ids=True)
    assert_equal(
        {k.replace("student.", ""): v for k, v in gradients(study, packed).items()},
        {k.replace("student.", ""): v for k, v in gradients(attended, packed).items()},
    )


@pytest.mark.parametrize("side", ["teacher", "student", "both"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "cross_entropy"])
def test_the_same_tokenizer_with_padded_rows_trains_on_the_real_ids_alone(
    name: str, side: str, tiny_llama: LlamaForCausalLM
) -> None:
    tiny_llama.double()
    teacher, real, batch = other(tiny_llama), tiny_llama.config.vocab_size, batch_of(*LENGTHS)
    wide_teacher, wide_student = copy.deepcopy(teacher), copy.deepcopy(tiny_llama)
    for model, padded in ((wide_teacher, side != "student"), (wide_student, side != "teacher")):
        if padded:
            model.resize_token_embeddings(real + 44)
    objective = ObjectiveConfig.parse(name, cross_entropy=0.5, temperature=1.5).build()
    narrow = gradients(TrainingModule(tiny_llama, objective, frozen={"teacher": teacher}, vocabulary=real), batch)
    wide = gradients(TrainingModule(wide_student, objective, frozen={"teacher": wide_teacher}, vocabulary=real), batch)
    assert all(not wide[name][real:].any() for name in wide if wide[name].shape[0] == real + 44)
    assert_equal(narrow, {name: g[:real] if g.shape[0] == real + 44 else g for name, g in wide.items()})


def test_temperature_divides_logits_and_multiplies_by_its_square(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    teacher, batch = other(tiny_llama), batch_of(*LENGTHS)
    for tau in (1.0, 3.0):
        study = TrainingModule(tiny_llama, LogitDistillation(temperature=tau), frozen={"teacher": teacher})
        ids, places = batch["input_ids"], batch["position_ids"]
        rows = batch["labels"][:, 1:] != IGNORE
        q, p = (
            torch.log_softmax(m(input_ids=ids, position_ids=places, use_cache=False).logits[:, :-1][rows] / tau, -1)
            for m in (tiny_llama, teacher)
        )
        literal = tau**2 * (p.exp() * (p - q)).sum(-1).mean()
        assert study(**batch)["loss"].item() == pytest.approx(literal.item(), rel=1e-9)


def test_a_sum_is_the_weighted_sum_of_its_parts(tiny_llama: LlamaForCausalLM) -> None:
    tiny_llama.double()
    teacher, batch = other(tiny_llama), batch_of(*LENGTHS)
    parts = ((0.3, CrossEntropy()), (0.7, LogitDistillation()))
    whole = gradients(TrainingModule(tiny_llama, WeightedSum(*parts), frozen={"teacher": teacher}), batch)
    alone = [gradients(TrainingModule(tiny_llama, part, frozen={"teacher": teacher}), batch) for _, part in parts]
    assert_equal(whole, {k: 0.3 * alone[0][k] + 0.7 * alone[1][k] for k in whole})
