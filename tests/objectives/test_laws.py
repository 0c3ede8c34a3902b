"""The laws of every objective, over one list: a new divergence, method or file of a user's is held to them at once.

Further laws over the same lists: packing and padding (test_registry, test_padding), two tokenizers (test_across,
test_permuted), weights and operations (test_objective_cost). `python -m tests.objectives.test_laws` writes the golden
sums of objectives that have none.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from tests.objectives.enumerated import ALIKE
from tests.objectives.test_invariants import batch_of, gradients
from tests.objectives.test_registry import larger, study_of
from tests.tiny import byte_tokenizer, random_llama
from torch import Tensor

from potstill.objectives.registry import find_spec
from potstill.ops.divergence import DIVERGENCES, get_facts
from potstill.train.training_module import TrainingModule

GOLDEN = Path(__file__).with_name("golden.json")
MINE = "my_kl"  # a divergence of a user's file
SOURCE = """
def my_kl(teacher, student):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
"""
NAMES = [*ALIKE, MINE]

NOT_ZERO = {  # the objectives that have a loss even at the teacher, and why
    "cross_entropy": "the text is not certain",
    "dskd": "its projectors are drawn",
    "dskd_cma": "its projectors are drawn",
    "hidden": "its maps are drawn",
    "relations": "its maps are drawn",
    "minillm": "its value has no meaning",
}
NOT_ITS_VALUE = {  # the objectives whose gradient is, on purpose, not that of their value, and why
    **{name: "its weights are constants" for name, d in DIVERGENCES.items() if not get_facts(d).has_full_gradient},
    "minillm": "a policy gradient",
    "dskd": "heads and projected distributions are constants",
    "dskd_cma": "heads and projected distributions are constants",
    "dskdv2": "heads and projected distributions are constants",
    "dskdv2_eta": "heads and projected distributions are constants",
}


@pytest.fixture
def full_name(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    return {MINE: f"{file}:{MINE}"}


def batch_for(name: str) -> dict[str, Tensor]:
    """Three documents; for a policy the student sampled one of them."""
    batch = batch_of(9, 5, 14)
    return batch | ({"sampled": batch["documents"] == 2} if name == "minillm" else {})


def module_of(name: str) -> TrainingModule:
    student = random_llama(byte_tokenizer()).double()
    return study_of(student, larger(student).double(), name)


def sums_of(module: TrainingModule, name: str) -> dict[str, float]:
    return dict(zip(module.term_names, module(**batch_for(name))["sums"].tolist(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_sums_are_the_golden_ones(name: str, full_name: dict[str, str]) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert name in golden or name == MINE, "run python -m tests.objectives.test_laws"
    expected = golden["forward_kl" if name == MINE else name]
    found = sums_of(module_of(full_name.get(name, name)), name)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4, abs=1e-9)
    assert name == MINE or list(found) == list(expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_ZERO])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name: str, full_name: dict[str, str]) -> None:
    student = random_llama(byte_tokenizer()).double()
    module = study_of(student, copy.deepcopy(student), full_name.get(name, name))
    found = {key: g for key, g in gradients(module, batch_for(name)).items() if key.startswith("student.")}
    assert all(abs(value) < 1e-10 for key, value in sums_of(module, name).items() if not key.endswith("_projector"))
    assert max(g.abs().max().item() for g in found.values()) < 1e-10


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_ITS_VALUE])
def test_the_gradient_is_that_of_the_value(name: str, full_name: dict[str, str]) -> None:
    """Its square is the slope of the loss along it, by central differences (norms of Llama are float32 inside)."""
    module, batch = module_of(full_name.get(name, name)), batch_for(name)
    slopes = gradients(module, batch)
    square = sum(float(g.square().sum()) for g in slopes.values())
    step, losses = 2e-3 / square**0.5, []
    weights = dict(module.named_parameters())
    with torch.no_grad():
        for shift in (step, -2 * step):
            for key, slope in slopes.items():
                weights[key].add_(slope, alpha=shift)
            losses.append(module(**batch)["loss"].item())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(square, rel=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_the_spec_says_what_the_objective_is(name: str, full_name: dict[str, str]) -> None:
    spec = find_spec(full_name.get(name, name))
    assert spec.help or name == MINE
    module = module_of(full_name.get(name, name))
    needs = module.objective.needs(batch_for(name))
    assert spec.uses_teacher == ("teacher" in needs)
    if not spec.needs_teacher_model or spec.needs_only_last_hidden:
        assert not (needs["student"] | needs.get("teacher", needs["student"])).relations
        assert all(not need.layers and not need.extras for need in needs.values())


def write_golden() -> None:
    """Add the sums of objectives that have none yet."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name in ALIKE:
        if name not in golden:
            golden[name] = sums_of(module_of(name), name)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_golden()
