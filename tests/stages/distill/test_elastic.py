"""Distilling into an elastic student trains, measures and keeps all of its sizes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.stages.world import interrupted

from potstill.core.errors import Interrupted, UsageError
from potstill.models.elastic import get_sizes
from potstill.models.load import load_model
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.measure import MeasureConfig
from potstill.train.config import TrainConfig

SETTINGS = TrainConfig(tokens=512, context=64, batch_tokens=128, micro_tokens=64, save_every=1, eval_every=4)


@pytest.fixture
def stage(teacher: Path, text: Path, tmp_path: Path) -> DistillConfig:
    ConvertConfig(
        model=str(teacher), to="elastic:shares=1-0.6-0.3", data=str(text), calibration_tokens=256, save_dtype="float32"
    ).run(tmp_path / "elastic")
    return DistillConfig(
        teacher=str(teacher),
        student=str(tmp_path / "elastic"),
        data=str(text),
        settings=SETTINGS,
        dtype="float32",
        documents=4,
    )


def test_all_sizes_are_trained_measured_and_kept(stage: DistillConfig, tmp_path: Path) -> None:
    out = tmp_path / "made"
    run = distill(stage, out, show=False)
    sizes = [f"{out}#0.6", f"{out}#0.3"]
    assert [size.share for size in get_sizes(load_model(out).model)] == [1, 0.6, 0.3]
    assert {"made", "made#0.6", "made#0.3", "teacher"} <= run.card.measures.keys()
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert any(f"{term}@0.3" in line for term in ("forward_kl", "eval_forward_kl"))
    after = MeasureConfig(models=tuple(sizes), data=str(stage.data), documents=4, speed=False, context=64).run()
    before = MeasureConfig(
        models=(f"{stage.student}#0.6", f"{stage.student}#0.3"),
        data=str(stage.data),
        documents=4,
        speed=False,
        context=64,
    ).run()
    for number, size in enumerate(sizes):
        bits, old = (
            {m["name"]: m["value"] for m in list(measures["models"].values())[number]} for measures in (after, before)
        )
        assert bits["bits_per_byte"] < old["bits_per_byte"]
        published = {m.name: m.value for m in run.card.measures[Path(size).name]}
        assert published["parameters"] == bits["parameters"]
        assert published["bits_per_byte"] == pytest.approx(bits["bits_per_byte"], rel=1e-2)


@pytest.mark.slow
def test_a_resumed_run_makes_the_same_weights(stage: DistillConfig, tmp_path: Path) -> None:
    stage = replace(stage, sizes_per_step=2, sizes_from="largest", settings=replace(SETTINGS, eval_every=0))
    with interrupted(tmp_path / "made"), pytest.raises(Interrupted):
        distill(stage, tmp_path / "made", show=False)
    distill(stage, tmp_path / "made", resume=True, show=False)
    distill(stage, tmp_path / "again", show=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("made", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": 2}, "--lora does not train the sizes"),
        ({"objective": ObjectiveConfig(name="hidden")}, "hidden does not train the sizes"),
        ({"student": "TEACHER", "sizes_from": "largest"}, "are for an elastic student"),
    ],
)
def test_what_trains_no_sizes_is_refused(
    stage: DistillConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    changes = {name: stage.teacher if value == "TEACHER" else value for name, value in changes.items()}
    with pytest.raises(UsageError, match=message):
        distill(replace(stage, **changes), tmp_path / "made", show=False)  # type: ignore[arg-type]
    assert not (tmp_path / "made").exists()


def test_a_wrong_number_of_sizes_is_refused(stage: DistillConfig) -> None:
    with pytest.raises(UsageError, match="a step trains at least 2"):
        replace(stage, sizes_per_step=1)
    with pytest.raises(UsageError, match="none of teacher, largest"):
        replace(stage, sizes_from="smallest")


@pytest.mark.slow
def test_one_size_is_trained_alone(stage: DistillConfig, tmp_path: Path) -> None:
    run = distill(replace(stage, student=f"{stage.student}#0.3"), tmp_path / "made", show=False)
    assert get_sizes(run.model) == ()
    assert run.model.config.num_hidden_layers == 1
