"""Several teachers at once: what they teach together is what each teaches, weighed row by row."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from tests.objectives.test_invariants import gradients
from torch import Tensor
from transformers import LlamaForCausalLM

from potstill.core.errors import UsageError
from potstill.core.types import (
    IGNORE,
    NEXT_TOKEN_LOG_P,
    Batch,
    Needs,
    Objective,
    Signals,
    gold_mask,
    supervised_positions,
)
from potstill.data.packing import collate
from potstill.models import signals as live
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.multi_teacher import (
    COMBINATIONS,
    ConfidenceWeightedTeachers,
    RoutedTeachers,
    TeacherEnsemble,
    combine_teachers,
)
from potstill.objectives.row_terms import RowObjective
from potstill.objectives.weighted_sum import WeightedSum
from potstill.ops.coarse import coarsen
from potstill.ops.divergence import DIVERGENCES, forward_kl, jsd, reverse_kl
from potstill.train.training_module import TrainingModule

NAMES = ("a", "b", "c")
LENGTHS, ROUTES = (9, 5, 14, 6, 7), (0, 1, 0, 2, 1)


def batch_of(lengths: Sequence[int] = LENGTHS, routes: Sequence[int] = ROUTES, *, prompt: int = 2) -> dict[str, Tensor]:
    """Packed documents with routes, of which all but the first tokens are trained."""
    packs = []
    for seed, (n, route) in enumerate(zip(lengths, routes, strict=True)):
        ids = torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(seed))
        labels = torch.where(torch.arange(n) < prompt, IGNORE, ids)
        of = {"lengths": torch.tensor([n]), "routes": torch.tensor([route])}
        packs.append({"input_ids": ids, "labels": labels, **of})
    return collate(packs)


def others(model: LlamaForCausalLM, names: Sequence[str] = NAMES) -> dict[str, LlamaForCausalLM]:
    """Teachers that differ from `model` and from one another."""
    found = {}
    for seed, name in enumerate(names):
        found[name] = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in found[name].parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return found


def parts(names: Sequence[str] = NAMES, **options: Any) -> list[LogitDistillation]:
    return [LogitDistillation(teacher=name, name=f"kl.{name}", **options) for name in names]


def together(combination: Any, names: Sequence[str] = NAMES, **options: Any) -> Objective:
    return combine_teachers(TeacherEnsemble(tuple(names), combination), parts(names, **options))


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert any(value.abs().max() > 1e-3 for value in a.values())
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-5, atol=1e-7)  # norms of Llama are float32 inside


@dataclass
class Recorded:
    """Answers as a model does, and keeps which documents it was asked to read."""

    model: LlamaForCausalLM
    read: list[int] = field(default_factory=list)

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        self.read += batch["documents"].unique().tolist()
        return live.compute_signals(self.model, batch, needs, vocabulary=vocabulary)


@dataclass
class Kept:
    """Answers with the `k` likeliest tokens of each distribution, in classes, as a cache does."""

    model: LlamaForCausalLM
    k: int
    temperature: float = 1.0

    def signals(self, batch: Batch, needs: Needs, *, vocabulary: int | None = None) -> Signals:
        said = live.compute_signals(self.model, batch, needs, vocabulary=vocabulary)
        logits = said.logits(said.rows) / self.temperature
        members = torch.eye(3, dtype=logits.dtype)[torch.arange(logits.shape[1]) % 3]
        known = coarsen(logits, self.k, members)
        return Signals(rows=torch.arange(len(known)), logits=known.select_rows)


# what all of them share


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_one_teacher_twice_is_that_teacher_alone(combination: str, tiny_llama: LlamaForCausalLM) -> None:
    student = tiny_llama.double()
    teacher = others(student, ["a"])["a"]
    alone = TrainingModule(
        student, WeightedSum((0.4, CrossEntropy()), (0.6, LogitDistillation())), frozen={"teacher": teacher}
    )
    objective = WeightedSum((0.4, CrossEntropy()), (0.6, together(combination, ["a", "b"])))
    twice = TrainingModule(student, objective, frozen={"a": teacher, "b": teacher})
    batch = batch_of(routes=(0, 1, 0, 1, 1))
    torch.testing.assert_close(twice(**batch)["loss"], alone(**batch)["loss"])
    assert_equal(gradients(twice, batch), gradients(alone, batch))


KINKED = ("total_variation", "acceptance_nll")  # at p = q they have no gradient
SMOOTH = {name: one for name, one in DIVERGENCES.items() if name not in KINKED}


@pytest.mark.parametrize("divergence", SMOOTH.values(), ids=SMOOTH)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_student_that_all_teachers_are_has_no_loss_and_no_gradient(
    combination: str, divergence: Any, tiny_llama: LlamaForCausalLM
) -> None:
    frozen = {name: copy.deepcopy(tiny_llama) for name in NAMES}
    study = TrainingModule(
        tiny_llama.double(), together(combination, divergence=divergence, temperature=2.0), frozen=frozen
    )
    for teacher in frozen.values():
        teacher.double()
    assert abs(study(**batch_of())["loss"].item()) < 1e-10
    assert max(g.abs().max().item() for g in gradients(study, batch_of()).values()) < 1e-9


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_the_fused_sums_are_those_of_all_logits_by_autograd(combination: str, tiny_llama: LlamaForCausalLM) -> None:
    student, batch = tiny_llama.double(), batch_of()
    frozen = others(student)
    study = TrainingModule(
        student, together(combination, divergence=partial(jsd, beta=0.3), temperature=1.5), frozen=frozen
    )
    positions, targets, _ = supervised_positions(batch)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    said = {name: model(**inputs, use_cache=False).logits[positions] for name, model in frozen.items()}
    z = student(**inputs, use_cache=False).logits[positions]
    each = torch.stack([jsd(p / 1.5, z / 1.5, beta=0.3) * 1.5**2 for p in said.values()])
    chances = torch.stack([(p / 1.5).log_softmax(-1).gather(-1, targets[:, None])[:, 0] for p in said.values()])
    shares = {
        "average": torch.full_like(chances, 1 / 3),
        "confidence": chances.exp() / chances.exp().sum(0),
        "route": torch.nn.functional.one_hot(batch["routes"][positions], 3).T.to(each),
    }[combination]
    expected = (shares.detach() * each).sum() / len(targets)
    torch.testing.assert_close(study(**batch)["loss"], expected)
    student.zero_grad()
    expected.backward()
    by_autograd = {f"student.{name}": p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert_equal(gradients(study, batch), by_autograd)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_packing_padding_and_cutting_into_passes_change_nothing(combination: str, tiny_llama: LlamaForCausalLM) -> None:
    student = tiny_llama.double()
    frozen = others(student)
    study = TrainingModule(student, together(combination), frozen=frozen)
    whole = gradients(study, batch_of())
    for model in (student, *frozen.values()):
        live._probes[model] = live.ModelProbe(has_known_head=True, supports_packing=False, takes_position_ids=True)
    assert_equal(gradients(study, batch_of()), whole)
    for model in (student, *frozen.values()):
        del live._probes[model]
    counts = study.counts(batch_of())
    first = batch_of()["documents"][0] < 2
    passes = [{name: value[:, some] for name, value in batch_of().items()} for some in (first, ~first)]
    each = [gradients(study, one, counts) for one in passes]
    assert_equal({name: torch.stack([one[name] for one in each]).sum(0) for name in whole}, whole)


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("kept", [("a",), ("b", "c"), NAMES])
def test_a_teacher_known_whole_from_a_cache_teaches_as_a_live_one(
    combination: str, kept: Sequence[str], tiny_llama: LlamaForCausalLM
) -> None:
    student = tiny_llama.double()
    frozen: dict[str, Any] = others(student)
    objective = WeightedSum((0.5, CrossEntropy()), (0.5, together(combination, temperature=2.0)))
    expected = gradients(TrainingModule(student, objective, frozen=frozen), batch_of())
    mixed = {
        name: Kept(one, one.config.vocab_size, temperature=2.0) if name in kept else one for name, one in frozen.items()
    }
    assert_equal(gradients(TrainingModule(student, objective, frozen=mixed), batch_of()), expected)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_each_teacher_has_a_term_and_its_counts_come_from_the_batch(combination: str) -> None:
    objective = together(combination)
    assert isinstance(objective, Objective)
    assert objective.additive
    assert list(objective.weights) == ["kl.a", "kl.b", "kl.c"]
    assert set(objective.counts(batch_of()).values()) == {len(supervised_positions(batch_of())[1])}
    assert set(objective.needs(batch_of())) == {"student", *NAMES}
    assert isinstance(objective, RowObjective | WeightedSum)


def test_one_teacher_is_not_several() -> None:
    with pytest.raises(UsageError, match="more than once"):
        combine_teachers(TeacherEnsemble(("a",), "average"), parts(["a"]))


# averaged


def test_under_the_forward_kl_the_average_has_the_gradient_of_the_mixture_and_differs_by_a_constant() -> None:
    generator = torch.Generator().manual_seed(3)
    teachers = torch.randn(3, 20, 11, generator=generator, dtype=torch.float64) * 2
    mixture = teachers.softmax(-1).mean(0).log()
    gaps = []
    for seed in (4, 5):
        z = torch.randn(20, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)
        both = torch.stack([forward_kl(p, z) for p in teachers]).mean(0), forward_kl(mixture, z)
        grads = [torch.autograd.grad(one.sum(), z)[0] for one in both]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)
        gaps.append((both[0] - both[1]).detach())
        reverse = torch.stack([reverse_kl(p, z) for p in teachers]).mean(0), reverse_kl(mixture, z)
        grads = [torch.autograd.grad(one.sum(), z)[0] for one in reverse]
        assert (grads[0] - grads[1]).abs().max() > 1e-2  # of no other divergence is it true
    torch.testing.assert_close(gaps[0], gaps[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gaps[0], torch.stack([forward_kl(p, mixture) for p in teachers]).mean(0))


def test_the_terms_of_an_average_are_each_teachers_own_divergence(tiny_llama: LlamaForCausalLM) -> None:
    frozen, batch = others(tiny_llama.double()), batch_of()
    sums = TrainingModule(tiny_llama, together("average"), frozen=frozen)(**batch)["sums"]
    for name, found in zip(NAMES, sums, strict=True):
        alone = TrainingModule(tiny_llama, LogitDistillation(), frozen={"teacher": frozen[name]})(**batch)["sums"]
        torch.testing.assert_close(found, alone[0])


# by confidence


def confidences(study: TrainingModule, batch: Batch, *, temperature: float = 1.0) -> Tensor:
    objective = ConfidenceWeightedTeachers(parts(temperature=temperature))
    needs = objective.needs(batch)
    return objective.compute_confidences(
        study._compute_frozen_signals(batch, {name: needs[name] for name in NAMES}), batch
    )


def test_weights_sum_to_one_and_are_the_chances_of_the_true_token(tiny_llama: LlamaForCausalLM) -> None:
    frozen, batch = others(tiny_llama.double()), batch_of()
    study = TrainingModule(tiny_llama, together("confidence"), frozen=frozen)
    found = confidences(study, batch)
    positions, targets, _ = supervised_positions(batch)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    p = torch.stack([one(**inputs, use_cache=False).logits[positions].softmax(-1) for one in frozen.values()])
    chance = p.gather(-1, targets.expand(3, -1)[..., None])[..., 0]
    torch.testing.assert_close(found, (chance / chance.sum(0)).detach())
    torch.testing.assert_close(found.sum(0), torch.ones(len(targets), dtype=torch.float64))
    assert found.std(0).max() > 0.1


def test_of_two_teachers_the_weights_are_those_of_the_paper() -> None:
    loss = torch.tensor([[0.1, 2.0, 3.0], [1.5, 2.0, 0.2]], dtype=torch.float64)  # cross-entropies of each, by row
    ours, theirs = (-loss).softmax(0), (1 - loss.exp() / loss.exp().sum(0)) / (len(loss) - 1)
    torch.testing.assert_close(ours, theirs)


def test_where_the_student_wrote_all_teachers_weigh_alike(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_of()
    batch["sampled"] = torch.isin(batch["documents"], torch.tensor([1, 2]))
    found = confidences(TrainingModule(tiny_llama.double(), together("confidence"), frozen=others(tiny_llama)), batch)
    torch.testing.assert_close(found[:, ~gold_mask(batch)], torch.full_like(found[:, ~gold_mask(batch)], 1 / 3))
    assert found[:, gold_mask(batch)].std(0).max() > 0.1


def test_what_a_server_tells_of_the_true_token_itself_is_taken() -> None:
    batch, told = batch_of(), torch.linspace(-3, -1, 31, dtype=torch.float64)
    said = {
        name: Signals(torch.arange(31), lambda some: some, scores={NEXT_TOKEN_LOG_P: k * told})
        for k, name in enumerate(NAMES)
    }
    expected = torch.stack([k * told for k in range(3)]).softmax(0)
    torch.testing.assert_close(ConfidenceWeightedTeachers(parts()).compute_confidences(said, batch), expected)


# routed


def test_all_documents_to_one_teacher_is_that_teacher_alone(tiny_llama: LlamaForCausalLM) -> None:
    student = tiny_llama.double()
    frozen: dict[str, Any] = {name: Recorded(one) for name, one in others(student).items()}
    batch = batch_of(routes=(1, 1, 1, 1, 1))
    routed = gradients(TrainingModule(student, together("route"), frozen=frozen), batch)
    alone = TrainingModule(student, LogitDistillation(), frozen={"teacher": frozen["b"].model})
    assert_equal(routed, gradients(alone, batch))
    assert not frozen["a"].read
    assert not frozen["c"].read  # a teacher without a document in a pass is not run at all


def test_each_teacher_reads_its_own_documents_alone_and_teaches_as_if_they_were_all(
    tiny_llama: LlamaForCausalLM,
) -> None:
    student, batch = tiny_llama.double(), batch_of()
    models = others(student)
    frozen: dict[str, Any] = {name: Recorded(one) for name, one in models.items()}
    study = TrainingModule(student, together("route"), frozen=frozen)
    counts = study.counts(batch)
    whole = gradients(study, batch, counts)
    for k, name in enumerate(NAMES):
        assert sorted(set(frozen[name].read)) == [n for n, route in enumerate(ROUTES) if route == k]
    own = []
    for k, name in enumerate(NAMES):
        mine = batch["routes"][0] == k
        some = {key: value[:, mine] for key, value in batch.items()}
        own.append(
            gradients(TrainingModule(student, LogitDistillation(), frozen={"teacher": models[name]}), some, counts[:1])
        )
    assert_equal({name: torch.stack([one[name] for one in own]).sum(0) for name in whole}, whole)


def test_terms_of_a_route_add_up_to_the_loss(tiny_llama: LlamaForCausalLM) -> None:
    batch = batch_of()
    study = TrainingModule(tiny_llama.double(), together("route"), frozen=others(tiny_llama))
    found = study(**batch)
    torch.testing.assert_close(found["loss"], found["sums"].sum() / len(supervised_positions(batch)[1]))
    assert (found["sums"] > 0).all()


def test_a_routed_objective_is_of_rows_and_shares_their_pass() -> None:
    assert isinstance(RoutedTeachers(parts()), RowObjective)
    assert isinstance(ConfidenceWeightedTeachers(parts()), RowObjective)
