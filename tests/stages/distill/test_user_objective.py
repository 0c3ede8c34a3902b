"""A divergence of a user's own file, from the call to the card, and under doctor's checks."""

from hashlib import sha256
from pathlib import Path

import pytest

from potstill import api
from potstill.core.card import Card
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.checks.report import FAIL
from potstill.stages.doctor import Doctor

MY_KL = """
def my_kl(teacher, student, scale=1.0):
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return scale * (log_p.exp() * (log_p - log_q)).sum(-1)


def shifted(teacher, student):
    return my_kl(teacher, student) + 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(MY_KL)
    return path


def test_a_run_learns_by_a_divergence_of_a_file_and_its_card_names_the_file_and_its_digest(
    file: Path, teacher: Path, text: Path, tmp_path: Path
) -> None:
    run = api.distill(
        out=tmp_path / "out",
        teacher=str(teacher),
        keep=0.755,
        data=str(text),
        objective=f"{file}:my_kl:scale=2",
        tokens=128,
        context=64,
        batch_tokens=128,
        micro_tokens=64,
        dtype="float32",
        documents=2,
    )
    assert isinstance(run.card, Card)
    objective = run.card.to_dict()["stage"]["objective"]
    assert objective["name"] == f"{file}:my_kl"
    assert objective["options"] == {"scale": 2.0, "sha256": sha256(file.read_bytes()).hexdigest()}
    assert '"my_kl"' in (run.out / "metrics.jsonl").read_text()


def test_doctor_examines_a_divergence_of_a_file(
    file: Path, teacher: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"cross_entropy": 0.5, "temperature": 2.0}
    sound = ObjectiveConfig.parse(f"{file}:my_kl", **options)
    checks = Doctor(teacher=str(teacher), data=str(text), objective=sound, context=64).run()
    assert not [check.name for check in checks if check.outcome == FAIL]
    shifted = ObjectiveConfig.parse(f"{file}:shifted", **options)
    assert "its minimum is not the teacher" in capsys.readouterr().err
    checks = Doctor(teacher=str(teacher), data=str(text), objective=shifted, context=64).run()
    assert len([check.name for check in checks if check.outcome == FAIL]) == 1
