"""What stays of a run beside the model: checkpoints that were asked for, and the logs of trackers."""

import contextlib
import importlib
import json
import os
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def read_wandb_records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: 7 bytes of header, then LevelDB's log of blocks of 32 KiB."""
    record_class = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:  # too short for the header of a chunk
            position += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)  # checksum, length, kind
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            yield record_class.FromString(record)
            record = b""


def test_the_log_of_wandb_is_read_back_and_nothing_is_uploaded_or_asked(
    stage: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed; run: pip install 'potstill[trackers]'")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    run = distill(replace(stage, settings=replace(SETTINGS, report_to=("wandb",))), tmp_path / "made", show=False)
    assert wandb.run is None
    (file,) = (run.out / "runs" / "wandb").glob("offline-run-*/*.wandb")
    lines = [
        {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in read_wandb_records(file)
    ]
    steps = [line["train/global_step"] for line in lines if "train/forward_kl" in line]
    assert steps == [1, 2, 3, 4]
    assert f"wandb sync {run.out / 'runs' / 'wandb'}/offline-run-*" in capsys.readouterr().err


def test_the_logs_of_trackio_are_read_back_each_from_the_folder_of_its_run(
    stage: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed; run: pip install 'potstill[trackers]'")
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    config = replace(stage, settings=replace(SETTINGS, report_to=("trackio",)))
    for name in ("first", "second"):
        run = distill(config, tmp_path / name, show=False)
        folder = run.out / "runs" / "trackio"
        with contextlib.closing(sqlite3.connect(folder / "huggingface.db")) as database:
            rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY id")]
        assert [row["train/global_step"] for row in rows if "train/forward_kl" in row] == [1, 2, 3, 4]
        shown = capsys.readouterr()
        assert f"TRACKIO_DIR={folder} trackio show" in shown.err
        assert "Trackio" not in shown.out
    assert "TRACKIO_DIR" not in os.environ


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
