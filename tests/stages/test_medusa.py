"""Medusa heads from a folder of text to `--draft medusa:FOLDER`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.stages.world import interrupted

import potstill
from potstill.core.errors import Interrupted, OutputExists, UsageError
from potstill.decode.drafters.head_folder import CONFIG_FILE, WEIGHTS_FILE
from potstill.stages.medusa.config import MedusaConfig
from potstill.stages.medusa.run import train_medusa
from potstill.train.config import TrainConfig

SETTINGS = TrainConfig(tokens=2048, context=64, batch_tokens=256, learning_rate=1e-2, warmup=0.1, weight_decay=0.0)


@pytest.fixture
def stage(teacher: Path, text: Path) -> MedusaConfig:
    return MedusaConfig(
        model=str(teacher), data=str(text), num_heads=2, settings=SETTINGS, documents=4, max_tokens=16, dtype="float32"
    )


def test_a_run_writes_heads_that_draft_and_a_card_with_their_accuracy(stage: MedusaConfig, tmp_path: Path) -> None:
    out = tmp_path / "made"
    card = train_medusa(stage, out)
    names = {CONFIG_FILE, WEIGHTS_FILE, "card.json", "metrics.jsonl", "curve.png"}
    assert {file.name for file in out.iterdir()} == names
    assert json.loads((out / "card.json").read_text())["stage"] == stage.to_dict()
    assert json.loads((out / CONFIG_FILE).read_text()) == {"kind": "medusa", "hidden": 32, "num_heads": 2}
    assert {weight.dtype for weight in load_file(out / WEIGHTS_FILE).values()} == {torch.bfloat16}
    assert set(card.measures) == {"before training", "made"}
    accuracies = card.details["top_1_accuracy_by_head"]
    assert [len(shares) for shares in accuracies.values()] == [2, 2]
    assert card.cost["losses"]["head_1"] < json.loads((out / "metrics.jsonl").read_text().split("\n")[0])["head_1"]
    texts = [
        potstill.generate(stage.model, "a wash a wash", raw=True, max_tokens=20, draft=name)
        for name in (None, f"medusa:{out}")
    ]
    assert texts[0] == texts[1]


def test_a_run_that_is_stopped_resumes_to_the_same_heads(stage: MedusaConfig, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    train_medusa(stage, whole)
    with interrupted(again), pytest.raises(Interrupted, match="--resume"):
        train_medusa(stage, again)
    with pytest.raises(UsageError, match=r"decay 0\.8, and now it is 0\.5"):
        train_medusa(replace(stage, decay=0.5), again, resume=True)
    train_medusa(stage, again, resume=True)
    assert (again / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()
    assert not (again / "training").exists()
    with pytest.raises(OutputExists):
        train_medusa(stage, again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        ({"max_tokens": 1}, "max_tokens is 1; it must be at least 2"),
        ({"decay": 0.0}, "decay is 0.0; it must be above 0"),
        ({"settings": TrainConfig(compile=True)}, "compile is for a student with layers"),
        ({"save_dtype": "int4"}, "int4"),
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, Any], words: str, stage: MedusaConfig) -> None:
    with pytest.raises(UsageError, match=words):
        replace(stage, **change)
