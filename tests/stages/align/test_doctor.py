"""What `doctor` and `plan` make of their options for an alignment."""

from typing import Any

import pytest

from potstill.core.errors import UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.align import doctor as align_doctor
from potstill.stages.align.config import AlignConfig
from potstill.stages.checks.report import Check
from potstill.stages.doctor import Doctor
from potstill.stages.option_checks import check_single_process
from potstill.train import distributed


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[AlignConfig]:
    """The alignments that were examined."""
    configs: list[AlignConfig] = []

    def record(config: AlignConfig) -> list[Check]:
        configs.append(config)
        return []

    monkeypatch.setattr(align_doctor, "examine", record)
    return configs


def make_doctor(objective: str, **options: Any) -> Doctor:
    config = ObjectiveConfig.from_options({"objective": objective, **options.pop("choice", {})})
    return Doctor(teacher="m", data="d.jsonl", objective=config, **options)


@pytest.mark.parametrize(("context", "expected"), [(None, 1024), (512, 512), (8192, 8192)])
def test_every_context_is_examined(context: int | None, expected: int, examined: list[AlignConfig]) -> None:
    make_doctor("dpo:beta=0.2", context=context).run()
    make_doctor("grpo", context=context, reward="accuracy").run()
    pairs, prompts = examined
    assert (pairs.settings.context, prompts.settings.context) == (expected, expected)
    assert (pairs.objective, pairs.model, pairs.data) == ("dpo:beta=0.2", "m", "d.jsonl")
    assert prompts.settings.packs_per_step == 1


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"teacher_cache": "c"}, "--teacher-cache"),
        ({"combine": "confidence"}, "--combine"),
        ({"choice": {"temperature": 2.0}, "combine": "confidence"}, "--combine and --temperature"),
    ],
)
def test_a_doctor_refuses_what_no_alignment_reads(
    options: dict[str, Any], names: str, examined: list[AlignConfig]
) -> None:
    with pytest.raises(UsageError, match=f"an alignment does not read {names}; omit"):
        make_doctor("dpo", **options).run()
    assert not examined


@pytest.mark.parametrize(
    "name", ["keep", "params", "teacher_cache", "combine", "min_document_tokens", "calibration", "cross_entropy"]
)
def test_a_plan_refuses_what_no_alignment_reads(name: str) -> None:
    options = {"student": "m", "objective": "dpo", "data": "d.jsonl", "lora": 8, "measure": False}
    assert align_doctor.make_align_config({**options, name: None}).lora == 8
    with pytest.raises(UsageError, match=f"an alignment does not read --{name.replace('_', '-')}; omit it"):
        align_doctor.make_align_config({**options, name: 1})


def test_stages_of_one_process_name_those_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="only distill and align run in several processes"):
        check_single_process()
