"""The sizes of an elastic student train together: the mean of their losses, in one set of weights."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.small import assert_same_bits, settings, some_packs
from tests.transforms.small import packed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, PreTrainedModel

from potstill.core.types import STEP, Batch
from potstill.data.packing import collate
from potstill.models.elastic import copy_size, get_sizes
from potstill.models.families.registry import export_model, import_model, read_blueprint, read_weights
from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.elastic import ElasticObjective
from potstill.stages.distill.resources import list_smaller_sizes
from potstill.stages.resources.dataset_stats import compute_packing_stats
from potstill.stages.resources.workload import Workload
from potstill.train.activation_checkpointing import activation_checkpointing
from potstill.train.run import train
from potstill.train.training_module import TrainingModule
from potstill.transforms.convert.registry import parse_conversion

OBJECTIVE = ObjectiveConfig(cross_entropy=0.5)


@pytest.fixture
def student(tiny_llama: LlamaForCausalLM) -> PreTrainedModel:
    """A tiny Llama of 3, 2 and 1 layers, with fewer heads and neurons too."""
    to_elastic = parse_conversion("elastic:shares=1-0.6-0.45-0.2,dims=both")
    return export_model(to_elastic.convert(import_model(tiny_llama), [packed(9, 8)])[0])


@pytest.fixture
def batch() -> Batch:
    packs = some_packs()
    return collate([packs[i] for i in range(3)])


def module_of(student: PreTrainedModel, teacher: PreTrainedModel, **options: Any) -> TrainingModule:
    """A module that trains the sizes of a copy of `student`."""
    student = export_model(import_model(student))
    sizes = get_sizes(student)
    given = {"sizes_per_step": 4, "from_largest": False, "seed": 1, **options}
    objective = ElasticObjective(OBJECTIVE.build(), [size.share for size in sizes], **given)
    return TrainingModule(student, objective, frozen={"teacher": teacher}, sizes=sizes)


def test_the_loss_and_its_gradient_are_the_means_of_those_of_the_sizes(
    student: PreTrainedModel, tiny_llama: LlamaForCausalLM, batch: Batch
) -> None:
    student, teacher = student.double(), tiny_llama.double()
    module = module_of(student, teacher)
    output = module(**batch)
    output["loss"].backward()
    losses, sizes = [], get_sizes(student)
    blueprint, weights = read_weights(module.student)
    gradients = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for size in sizes:
        copied = copy_size(student, size.share)
        alone = TrainingModule(copied, OBJECTIVE.build(), frozen={"teacher": teacher})(**batch)
        alone["loss"].backward()
        losses.append(alone["loss"])
        sums = output["sums"][[name.endswith(f"@{size.share:g}") for name in module.term_names]]
        torch.testing.assert_close(sums, alone["sums"])
        parts = size.weights(gradients, blueprint)
        for name, weight in read_weights(copied)[1].items():
            parts[name].add_(weight.grad / len(sizes))
    torch.testing.assert_close(output["loss"], torch.stack(losses).mean())
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, gradients[name], msg=name)


def test_one_size_is_ordinary_distillation(student: PreTrainedModel, batch: Batch) -> None:
    plain = OBJECTIVE.build()
    sized = ElasticObjective(plain, [1.0], sizes_per_step=4, from_largest=True, seed=1)
    losses = [TrainingModule(student, o, frozen={"teacher": student})(**batch)["loss"] for o in (plain, sized)]
    assert torch.equal(*losses)


def test_smaller_sizes_learn_from_the_largest_as_from_a_constant(
    student: PreTrainedModel, tiny_llama: LlamaForCausalLM, batch: Batch
) -> None:
    student, teacher = student.double(), tiny_llama.double()
    with torch.no_grad():
        for weight in student.parameters():
            weight.mul_(1.1)
    largest = export_model(import_model(student))
    module = module_of(student, teacher, from_largest=True)
    expected = []
    for size in get_sizes(student):
        taught_by = teacher if size.share == 1 else largest
        alone = TrainingModule(copy_size(student, size.share), OBJECTIVE.build(), frozen={"teacher": taught_by})
        expected.append(alone(**batch)["loss"])
    output = module(**batch)
    torch.testing.assert_close(output["loss"], torch.stack(expected).mean())
    sizes = module.objective.shares[1:]
    small = [name for name in module.term_names if name.startswith("forward_kl") and not name.endswith("@1")]
    assert len(small) == len(sizes)
    weights = torch.tensor([name in small for name in module.term_names])
    assert (output["sums"][weights] > 0).all()


def test_a_step_trains_the_largest_the_smallest_and_random_others(batch: Batch) -> None:
    shares = (1.0, 0.8, 0.6, 0.4, 0.2)
    objective = ElasticObjective(OBJECTIVE.build(), shares, sizes_per_step=3, from_largest=False, seed=7)
    drawn = [objective.draw_sizes({**batch, STEP: torch.tensor(step)}) for step in range(300)]
    assert all(sizes[0] == 1 and sizes[-1] == 0.2 and len(sizes) == 3 for sizes in drawn)
    assert min(Counter(sizes[1] for sizes in drawn).values()) > 70
    assert drawn == [objective.draw_sizes({STEP: torch.tensor(step)}) for step in range(300)]
    other = ElasticObjective(OBJECTIVE.build(), shares, sizes_per_step=3, from_largest=False, seed=8)
    assert drawn != [other.draw_sizes({STEP: torch.tensor(step)}) for step in range(300)]
    assert objective.draw_sizes(batch) == shares  # outside of training
    counts = objective.counts({**batch, STEP: torch.tensor(0)})
    assert {name.partition("@")[2] for name, count in counts.items() if count} == {f"{s:g}" for s in drawn[0]}
    assert sum(objective.weights.values()) == pytest.approx(5 / 3)


def test_the_split_into_passes_changes_no_step_and_a_resumed_run_draws_alike(
    student: PreTrainedModel, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    packs, modules = some_packs(), [module_of(student, tiny_llama, sizes_per_step=3) for _ in range(3)]
    whole = train(modules[0], packs, settings(), tmp_path / "whole", run_id="a")
    train(modules[1], packs, settings(micro_tokens=32), tmp_path / "split", run_id="a")
    for one, other in zip(modules[0].student.parameters(), modules[1].student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert {"forward_kl@1", "cross_entropy@0.2"} <= whole.losses.keys()
    last = max((tmp_path / "whole").glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    for file in sorted(last.rglob("*")):
        file.unlink()
    last.rmdir()
    train(modules[2], packs, settings(), tmp_path / "whole", run_id="a", resume=True)
    assert_same_bits(modules[0], modules[2])


def test_checkpointed_activations_give_the_same_gradients(
    student: PreTrainedModel, tiny_llama: LlamaForCausalLM, batch: Batch
) -> None:
    module = module_of(student, tiny_llama).train()
    module(**batch)["loss"].backward()
    expected = _take_gradients(module)
    for model in module.students:
        with activation_checkpointing(model):  # type: ignore[arg-type]
            module(**batch)["loss"].backward()
        for name, gradient in _take_gradients(module).items():
            torch.testing.assert_close(gradient, expected[name])


def _take_gradients(module: TrainingModule) -> dict[str, Tensor]:
    gradients = {name: weight.grad.clone() for name, weight in module.student.named_parameters()}
    module.zero_grad()
    return gradients


def test_a_plan_counts_the_operations_of_all_sizes(student: PreTrainedModel, tiny_llama: LlamaForCausalLM) -> None:
    packs, blueprint, teacher = some_packs(), read_blueprint(student.config), read_blueprint(tiny_llama.config)
    text = compute_packing_stats(packs)
    work = Workload(teacher=teacher, student=blueprint, vocabulary=259, settings=settings(), packing=text)
    work = replace(work, objective=ObjectiveConfig(name="forward_kl"), sizes=list_smaller_sizes(blueprint, 4))
    module = module_of(student, tiny_llama)
    with FlopCounterMode(display=False) as counter:
        module(**collate([packs[i] for i in range(len(packs))]))["loss"].backward()
    found = counter.get_total_flops() + work.student_flops.head * packs.num_tokens
    teacher_attention = work.count_forward_flops(teacher).attention
    counted = sum(work.flops().values()) - 3.5 * work.student_flops.attention - teacher_attention
    assert found / packs.num_tokens == pytest.approx(counted, rel=0.01)
    assert replace(work, sizes=list_smaller_sizes(blueprint, 3)).student_passes == 3
    assert list_smaller_sizes(teacher, 4) == ()
