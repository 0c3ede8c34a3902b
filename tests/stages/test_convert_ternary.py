"""A ternary model heals by distillation from its original; its packed folder opens alike and is no student."""

from pathlib import Path

import pytest
import torch

from potstill.core.errors import UnsupportedModel
from potstill.layers.linear.ternary import Ternary
from potstill.models.load import load_model
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.checks.report import PASS
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.doctor import Doctor
from potstill.train.config import TrainConfig


def test_a_packed_folder_is_small_opens_alike_and_is_not_trained(teacher: Path, tmp_path: Path) -> None:
    ConvertConfig(model=str(teacher), to="ternary").run(tmp_path / "ternary")
    card = ConvertConfig(model=str(tmp_path / "ternary"), to="packed_ternary").run(tmp_path / "packed")
    assert card.details["share"] == 1
    sizes = card.details["weight_bytes"]
    assert sizes["after"] < sizes["before"]
    loaded = load_model(tmp_path / "packed")
    assert loaded.quantization == "packed_ternary"
    ids = torch.arange(5, 25)[None]
    expected = load_model(tmp_path / "ternary").model(ids).logits
    torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModel, match="can only be a --teacher"):
        ConvertConfig(model=str(tmp_path / "packed"), to="ternary").run(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_distillation_from_the_original_heals(teacher: Path, text: Path, tmp_path: Path) -> None:
    ConvertConfig(model=str(teacher), to="ternary").run(tmp_path / "ternary")
    config = DistillConfig(
        teacher=str(teacher),
        student=str(tmp_path / "ternary"),
        data=str(text),
        objective=ObjectiveConfig(name="forward_kl", cross_entropy=0.0),
        settings=TrainConfig(tokens=5_000, context=64, batch_tokens=256, micro_tokens=256, learning_rate=3e-3),
    )
    run = distill(config, tmp_path / "healed")
    assert run.student.teacher_kl.value < 0.6 * run.before_training.teacher_kl.value
    model = load_model(tmp_path / "healed").model
    assert {layer.linear for layer in model.backbone.blueprint.layers} == {Ternary(eps=1e-6)}


@pytest.mark.parametrize("options", ["", ":norm=true"])
def test_the_doctor_passes_a_ternary_student(teacher: Path, text: Path, tmp_path: Path, options: str) -> None:
    ConvertConfig(model=str(teacher), to=f"ternary{options}", data=str(text)).run(tmp_path / "ternary")
    doctor = Doctor(
        teacher=str(teacher), student=str(tmp_path / "ternary"), data=str(text), context=64, dtype="float32"
    )
    checks = doctor.run()
    assert {check.outcome for check in checks} == {PASS}, [check for check in checks if check.outcome != PASS]
    assert "finite differences" in {check.name for check in checks}
