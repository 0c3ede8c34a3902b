"""Text for a stage: columns by another name reach every verb that reads."""

from pathlib import Path

import pytest
from tests.pipeline.world import written

from potstill.core.errors import DataError, UsageError
from potstill.pipeline.measure import Measurement
from potstill.pipeline.texts import Text, columns_of, described, held_out_corpus, shortened

SAID = "prompt=instruction, response=text"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Prompts and responses under names that mean something else."""
    return written(tmp_path / "odd.jsonl", [{"instruction": f"Say {i}.", "text": f"It is {i}."} for i in range(60)])


def test_columns_are_told_by_name_and_by_nothing_else() -> None:
    assert columns_of(SAID) == {"prompt": "instruction", "response": "text"}
    assert columns_of("") is None
    for wrong in ("prompt", "prompt=", "=text", "prompt=a,,response=b"):
        with pytest.raises(UsageError, match="prompt=instruction,response=text"):
            columns_of(wrong)


def test_long_documents_are_measured_by_their_beginnings_and_short_ones_whole() -> None:
    assert shortened(["abc", "defg"], limit=7) == ["abc", "defg"]
    assert shortened(["abc", "defgh"], limit=7) == ["abc", "def"]
    assert shortened([]) == []


def test_named_columns_are_read_where_unnamed_ones_are_refused(odd: Path, teacher: Path) -> None:
    with pytest.raises(DataError, match="--columns prompt=NAME,response=NAME"):
        described(str(odd), str(teacher), context=64, split="all")
    assert described(str(odd), str(teacher), context=64, split="all", columns=SAID)["kind"] == "pairs"
    assert held_out_corpus(Text(data=str(odd), columns=SAID)).kind == "pairs"
    measured = Measurement(models=(str(teacher),), data=str(odd), columns=SAID, context=64, speed=False, prompts=2)
    (found,) = measured.run()["models"].values()
    assert "rouge_l" in {measure["name"] for measure in found}
