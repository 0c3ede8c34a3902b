"""The trainer by itself: what it counts, divides, clips, schedules, evaluates and saves."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.train.small import settings, some_packs, study_of
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback

from potstill.core.types import Batch, Needs, Signals, Terms, supervised_positions
from potstill.data.packing import collate
from potstill.objectives.cross_entropy import CrossEntropy
from potstill.objectives.weighted_sum import WeightedSum
from potstill.train.config import TrainConfig
from potstill.train.trainer import Trainer
from potstill.train.training_arguments import make_training_arguments
from potstill.train.training_module import TrainingModule


class Projected(nn.Module):
    """An objective with a weight of its own: sum of (w . row)^2 over every second supervised row."""

    additive = True
    weights: ClassVar[dict[str, float]] = {"projected": 0.5}

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(32, 1, bias=False)

    def needs(self, batch: Batch) -> dict[str, Needs]:
        return {"student": Needs(supervised_positions(batch)[0])}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"projected": (len(supervised_positions(batch)[1]) + 1) // 2}

    def forward(self, views: dict[str, Signals], frozen: dict[str, Signals], batch: Batch) -> Terms:
        return {"projected": self.projector(views["student"].rows[::2]).square().sum()}


def trainer_of(
    study: TrainingModule, folder: Path, options: TrainConfig, *callbacks: TrainerCallback, **more: Any
) -> Trainer:
    args = make_training_arguments(options, folder)
    return Trainer(study, args, train_dataset=some_packs(), callbacks=list(callbacks), **more)


class Norms(TrainerCallback):
    """The gradient's norm and the learning rates as the optimiser meets them."""

    def __init__(self, study: TrainingModule) -> None:
        self.study = study
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad.flatten() for p in self.study.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def test_counts_are_summed_over_micro_batches_term_by_term(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = TrainingModule(tiny_llama, WeightedSum((1.0, CrossEntropy()), (1.0, Projected())))
    trainer, packs = trainer_of(study, tmp_path, settings()), some_packs()
    batches = [collate([packs[i]]) for i in range(3)]
    counted = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert counted is not None
    by_hand = [[len(supervised_positions(b)[1]), (len(supervised_positions(b)[1]) + 1) // 2] for b in batches]
    assert counted.tolist() == [sum(term) for term in zip(*by_hand, strict=True)]
    assert trainer._get_num_items_in_batch([], torch.device("cpu")) is None


def test_the_gradient_of_accumulated_passes_is_that_of_all_rows_at_once(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    study = study_of(tiny_llama.double())
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = {name: p.grad.clone() for name, p in study.named_parameters() if p.grad is not None}
            seen[args.gradient_accumulation_steps] = grads

    start = {name: weight.clone() for name, weight in study.state_dict().items()}
    for micro in (256, 32):
        study.load_state_dict(start)
        options = settings(tokens=256, batch_tokens=256, micro_tokens=micro, clip=0.0)
        trainer_of(study, tmp_path / str(micro), options, Keep()).train()
    assert sorted(seen) == [1, 8]
    for name, whole in seen[1].items():
        torch.testing.assert_close(seen[8][name], whole, rtol=1e-6, atol=1e-9)  # Llama's norms are float32 inside


def test_the_rate_rises_evenly_to_its_height_and_falls_to_its_share(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    study = TrainingModule(tiny_llama, CrossEntropy())
    rates = Norms(study)
    options = settings(tokens=20 * 64, learning_rate=1e-3, warmup=0.25, final_rate=0.1, save_every=50)
    trainer_of(study, tmp_path, options, rates).train()
    assert rates.rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert all(a > b for a, b in zip(rates.rates[4:], rates.rates[5:], strict=False))
    assert rates.rates[-1] == pytest.approx(1e-4)
    middle = rates.rates[4 + 8 : 4 + 8 + 1][0]
    assert middle == pytest.approx((1e-3 + 1e-4) / 2, rel=0.15)


@pytest.mark.parametrize("clip", [0.01, 0.0])
def test_gradients_are_clipped_to_the_norm_that_was_asked_for(
    clip: float, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    study = TrainingModule(tiny_llama, CrossEntropy())
    met = Norms(study)
    trainer = trainer_of(study, tmp_path, settings(tokens=128, clip=clip), met)
    trainer.train()
    logged = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert min(logged) > 0.01  # the norm before clipping
    assert met.norms == pytest.approx([0.01, 0.01] if clip else logged, rel=1e-3)


def test_evaluation_sums_over_all_rows_and_divides_once(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study, rows = study_of(tiny_llama), some_packs(9, seed=4)
    assert len(rows) % 2  # the last pass is smaller than the others
    trainer = trainer_of(study, tmp_path, settings(), eval_dataset=rows)
    found = trainer.evaluate()
    with torch.no_grad():
        whole = study(**collate([rows[i] for i in range(len(rows))]))
    assert found["eval_loss"] == pytest.approx(whole["loss"].item(), rel=1e-5)
    for name, total, count in zip(
        study.term_names, whole["sums"], study.counts(collate([rows[i] for i in range(len(rows))])), strict=True
    ):
        assert found[f"eval_{name}"] == pytest.approx((total / count).item(), rel=1e-5)


def test_evaluation_leaves_the_mode_as_it_found_it(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    study = study_of(tiny_llama)
    trainer = trainer_of(study, tmp_path, settings(), eval_dataset=some_packs(3))
    for mode in (True, False):
        study.train(mode)
        trainer.evaluate()
        assert study.training is study.student.training is mode


def test_norms_and_biases_do_not_decay_and_every_weight_is_in_one_group(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    study = TrainingModule(tiny_llama, WeightedSum((1.0, CrossEntropy()), (1.0, Projected())))
    optimiser = trainer_of(study, tmp_path, settings(weight_decay=0.2)).create_optimizer()
    groups = {group["name"]: group for group in optimiser.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "decay": 0.2,
        "no_decay": 0.0,
        "objective": 0.0,
    }
    norms = {id(p) for name, p in study.named_parameters() if "norm" in name}
    assert {id(p) for p in groups["no_decay"]["params"]} == norms
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in study.parameters())


def test_an_objective_with_weights_is_trained_saved_and_resumed(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    def fresh() -> TrainingModule:
        torch.manual_seed(3)
        copied = study_of(tiny_llama).student
        return TrainingModule(copied, WeightedSum((1.0, CrossEntropy()), (1.0, Projected())))

    straight, first, again = fresh(), fresh(), fresh()
    start = straight.objective.state_dict()["trained.0.projector.weight"].clone()
    trainer_of(straight, tmp_path / "a", settings()).train()
    trainer_of(first, tmp_path / "b", settings()).train()
    trainer_of(again, tmp_path / "c", settings()).train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(straight.objective.state_dict()["trained.0.projector.weight"], start)
    assert (tmp_path / "a" / "checkpoint-6" / "objective.safetensors").is_file()


def test_trackers_are_passed_on(tmp_path: Path) -> None:
    assert make_training_arguments(settings(report_to=("tensorboard",)), tmp_path).report_to == ["tensorboard"]
    assert make_training_arguments(settings(), tmp_path).report_to == []
