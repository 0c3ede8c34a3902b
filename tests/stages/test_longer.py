"""A model whose context was lengthened trains on long documents, and is measured by the original."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.stages.world import saved, written
from tests.tiny import byte_tokenizer, random_llama

from potstill.cli import tables
from potstill.core.errors import DataError, UsageError
from potstill.models.load import load_model
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.generate_text import generate_text
from potstill.stages.measure import MeasureConfig
from potstill.stages.plan.inputs import read_inputs
from potstill.train.config import TrainConfig

CROSS_ENTROPY = ObjectiveConfig(name="cross_entropy")
LINES = [{"text": f"{n} " + "worms run over cold spirit " * (9 if n % 4 == 0 else 1)} for n in range(80)]


@pytest.fixture
def stage(tmp_path: Path) -> DistillConfig:
    tokenizer = byte_tokenizer()
    original = saved(tmp_path / "original", random_llama(tokenizer, context=64), tokenizer)
    ConvertConfig(model=str(original), to="longer:factor=4").run(tmp_path / "longer")
    return DistillConfig(
        teacher=str(original),
        student=str(tmp_path / "longer"),
        data=str(written(tmp_path / "text.jsonl", LINES)),
        objective=CROSS_ENTROPY,
        settings=TrainConfig(tokens=512, context=256, batch_tokens=256, micro_tokens=256),
        min_document_tokens=200,
        documents=2,
        dtype="float32",
    )


def test_it_trains_beyond_the_context_of_a_teacher_that_only_measures(stage: DistillConfig, tmp_path: Path) -> None:
    run = distill(stage, tmp_path / "trained", show=False)
    long_documents = run.card.data["long_documents"]
    assert long_documents["long"] == 19
    assert 0 < long_documents["short_share"] <= 0.2
    assert run.card.data["windows"]["documents"] == 19 + long_documents["shorter"]
    assert {"bits_per_byte", "teacher_kl"} <= {measure.name for measure in run.measures["trained"]}
    model = load_model(tmp_path / "trained").model
    assert model.config.max_position_embeddings == 256
    assert model.config.rope_parameters["rope_type"] == "yarn"
    prompt = "a" * 240
    text = generate_text(str(tmp_path / "trained"), prompt, AnswerOptions(raw=True, max_tokens=8, dtype="float32"))
    assert text["prompt"] == prompt
    with pytest.raises(UsageError, match="exceed the 256 tokens of context"):
        generate_text(str(tmp_path / "trained"), "a" * 250, AnswerOptions(raw=True, max_tokens=8))


def test_a_context_longer_than_a_model_s_is_refused_in_one_sentence(stage: DistillConfig, tmp_path: Path) -> None:
    message = r"64 tokens of context that LlamaForCausalLM has; give a shorter one, or convert the model by --to longer"
    for changed in (replace(stage, objective=ObjectiveConfig()), replace(stage, student=stage.teacher)):
        with pytest.raises(UsageError, match=message):
            distill(changed, tmp_path / "trained", show=False)
    with pytest.raises(DataError, match=r"no document of .* has 300 tokens; the longest has 2"):
        distill(replace(stage, min_document_tokens=300), tmp_path / "trained", show=False)
    assert not (tmp_path / "trained").exists()


def test_its_plan_needs_the_long_context_of_the_student_alone(stage: DistillConfig) -> None:
    inputs = read_inputs(stage)
    assert (inputs.student.context, inputs.teacher.context, inputs.packs.length) == (256, 64, 256)
    with pytest.raises(UsageError, match="one of the models takes 64 tokens; give a shorter one"):
        read_inputs(replace(stage, objective=ObjectiveConfig()))


def test_measure_says_how_models_use_a_long_context(
    stage: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"data": stage.data, "split": "all", "context": 64, "documents": 8, "speed": False}
    monkeypatch.chdir(Path(str(stage.student)).parent)  # a short name leaves room for the columns of the table
    config = MeasureConfig(models=(Path(str(stage.student)).name,), positions=128, needle=200, **options)
    result = config.run(tmp_path / "measures.json")
    assert (tmp_path / "measures.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "measures.json").read_text()) == result
    (rows,) = result["positions"].values()
    assert [(row["start"], row["stop"]) for row in rows] == [(0, 32), (32, 64), (64, 128)]
    (cells,) = result["needle"].values()
    assert {cell["length"] for cell in cells} == {100, 200}
    assert {cell["n"] for cell in cells} == {8}
    measures = {measure["name"]: measure for measure in next(iter(result["models"].values()))}
    assert measures["long_bits_per_byte"]["value"] == rows[-1]["bits_per_byte"]
    assert measures["long_bits_per_byte"]["note"].startswith("positions 64 to 128")
    assert measures["needle_accuracy"]["value"] == pytest.approx(sum(cell["accuracy"] for cell in cells) / len(cells))
    tables.print_measurement(result)
    screen = capsys.readouterr().out
    assert "64 to 128" in screen
    assert "200 tokens" in screen
    for name in ("positions", "needle"):
        with pytest.raises(UsageError, match=f"--{name} 300 is longer than the 256 tokens of context"):
            MeasureConfig(models=(str(stage.student),), **options, **{name: 300}).run()
        with pytest.raises(UsageError, match="give at least 64 tokens"):
            MeasureConfig(models=(str(stage.student),), **options, **{name: 8})
    with pytest.raises(DataError, match="no document that is measured has 250 tokens"):
        MeasureConfig(models=(str(stage.student),), **options, positions=250).run()


def test_a_long_context_is_measured_on_texts(stage: DistillConfig, pairs: Path) -> None:
    with pytest.raises(UsageError, match="read plain texts"):
        MeasureConfig(models=(str(stage.student),), data=str(pairs), context=64, speed=False, needle=200).run()
