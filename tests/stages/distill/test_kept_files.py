"""What stays of a run beside the model: checkpoints that were asked for, and the logs of trackers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from potstill.core.errors import UsageError
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.train.config import TrainConfig
from potstill.train.trackers import describe_log

SETTINGS = TrainConfig(tokens=512, context=32, batch_tokens=128, micro_tokens=128, save_every=1)


@pytest.fixture
def stage(teacher: Path, text: Path) -> DistillConfig:
    options = {"teacher": str(teacher), "student": str(teacher), "data": str(text), "documents": 2}
    return DistillConfig(settings=SETTINGS, dtype="float32", skip_doctor=True, **options)  # type: ignore[arg-type]


def test_the_newest_checkpoints_stay_whole_and_in_float32(stage: DistillConfig, tmp_path: Path) -> None:
    run = distill(replace(stage, settings=replace(SETTINGS, keep_checkpoints=3)), tmp_path / "made", show=False)
    folders = sorted((run.out / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert all((folder / "optimizer.pt").is_file() for folder in folders)
    last, made = load_file(folders[-1] / "model.safetensors"), load_file(run.out / "model.safetensors")
    assert {weight.dtype for weight in last.values()} == {torch.float32}
    assert all(torch.equal(last[name].to(torch.bfloat16), weight) for name, weight in made.items())
    assert not (run.out / "training").exists()


def test_a_negative_number_of_checkpoints_is_refused() -> None:
    with pytest.raises(UsageError, match="keep_checkpoints is -1"):
        replace(SETTINGS, keep_checkpoints=-1)


def test_the_events_of_tensorboard_are_read_back(
    stage: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    run = distill(replace(stage, settings=replace(SETTINGS, report_to=("tensorboard",))), tmp_path / "made", show=False)
    (folder,) = (run.out / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/forward_kl")] == [1, 2, 3, 4]
    assert f"tensorboard --logdir {run.out / 'runs'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tracker", "variable", "place"),
    [
        ("tensorboard", "TENSORBOARD_LOGGING_DIR", "elsewhere;"),
        ("wandb", "WANDB_DIR", "elsewhere/wandb;"),
        ("trackio", "TRACKIO_DIR", "elsewhere;"),
    ],
)
def test_the_place_of_a_log_is_named(
    tracker: str, variable: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(variable, raising=False)
    assert "elsewhere" not in describe_log(tracker, tmp_path)
    monkeypatch.setenv(variable, "elsewhere")
    assert place in describe_log(tracker, tmp_path)
