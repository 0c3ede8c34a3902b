"""A text that is too long for a teacher with another tokenizer is found before the first step."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.data.trained import byte_level
from tests.objectives.crossed import llama
from tests.stages.world import saved, written
from tests.tiny import byte_tokenizer, random_llama

from potstill.core.errors import UsageError
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.train.config import TrainConfig

LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind. {}"


@pytest.fixture
def stage(tmp_path: Path) -> DistillConfig:
    lines = [{"text": LONG.format(n) if n % 8 == 0 else f"the dog {n}"} for n in range(80)]
    student, teacher = byte_level(), byte_tokenizer()
    return DistillConfig(
        teacher=str(saved(tmp_path / "teacher", random_llama(teacher, context=64), teacher)),
        student=str(saved(tmp_path / "student", llama(student, 32, 1), student)),
        data=str(written(tmp_path / "text.jsonl", lines)),
        objective=ObjectiveConfig(name="uld"),
        settings=TrainConfig(tokens=1024, context=48, batch_tokens=192, eval_every=2),
        documents=2,
        dtype="float32",
        skip_doctor=True,
    )


def test_windows_that_the_teacher_cannot_read_are_left_out_and_counted(
    stage: DistillConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = distill(stage, tmp_path / "made", show=False)
    dropped = run.card.data["dropped"]["more tokens than the teacher reads"]
    assert 5 <= dropped <= 10
    note = capsys.readouterr().err
    assert f"{dropped} of {run.card.data['documents'] + dropped} windows are left out: they have up to 7" in note
    assert "of the teacher, which reads 64; --context 4" in note
    assert f"{dropped} with more tokens than the teacher reads" in (run.out / "README.md").read_text()


def test_a_text_of_which_no_window_fits_is_refused_before_anything_is_written(
    stage: DistillConfig, tmp_path: Path
) -> None:
    lines = [{"text": LONG.format(n)} for n in range(80)]
    data = str(written(tmp_path / "long.jsonl", lines))
    with pytest.raises(UsageError, match=r"windows has more tokens of the teacher than the 64 .* such as 4\d$"):
        distill(replace(stage, data=data), tmp_path / "made", show=False)
    assert not (tmp_path / "made").exists()
