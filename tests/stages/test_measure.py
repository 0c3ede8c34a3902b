"""Measuring side by side: which text is read, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.stages.world import THINKING, saved
from tests.tiny import CHATML
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from potstill.core.errors import UsageError
from potstill.stages.measure import MeasureConfig


@pytest.fixture
def measurement(teacher: Path, pairs: Path) -> MeasureConfig:
    return MeasureConfig(models=(str(teacher),), data=str(pairs), context=64, speed=False, prompts=2)


@pytest.fixture
def foreign(teacher: Path, tmp_path: Path) -> Path:
    """The teacher, with two letters of its tokenizer exchanged."""
    folder = shutil.copytree(teacher, tmp_path / "foreign")
    table = json.loads((folder / "tokenizer.json").read_text())
    words = table["model"]["vocab"]
    words["e"], words["t"] = words["t"], words["e"]
    (folder / "tokenizer.json").write_text(json.dumps(table))
    return folder


MARKED = CHATML.replace(
    "message['content'] +", "('<|seven|>' if '7' in message['content'] else '') + message['content'] +"
)


@pytest.fixture
def thinker(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The teacher, whose template writes an empty thinking block before an answer."""
    tiny_tokenizer.chat_template = THINKING
    return saved(tmp_path / "thinker", tiny_llama, tiny_tokenizer)


@pytest.fixture
def wider(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The teacher with one more token, which its template writes before a turn that holds a 7."""
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|seven|>"]})
    tiny_tokenizer.chat_template = MARKED
    tiny_llama.resize_token_embeddings(260, mean_resizing=False)
    return saved(tmp_path / "wider", tiny_llama, tiny_tokenizer)


def read_measures(measurement: MeasureConfig) -> dict[str, dict[str, Any]]:
    """The measures by name of the one model that `measurement` names first."""
    measures = next(iter(measurement.run()["models"].values()))
    return {measure["name"]: measure for measure in measures}


def documents(measurement: MeasureConfig) -> int:
    (measures,) = measurement.run()["models"].values()
    return next(m["n"] for m in measures if m["name"] == "bits_per_byte")


def test_a_file_is_read_whole_only_where_that_is_said(measurement: MeasureConfig) -> None:
    held_out, seen, whole = (documents(replace(measurement, split=split)) for split in ("validation", "train", "all"))
    assert held_out + seen == whole == 60
    assert held_out < seen


def test_answers_are_judged_where_something_is_asked(measurement: MeasureConfig, text: Path) -> None:
    names = [
        {m["name"] for m in measures}
        for data in (measurement.data, str(text))
        for measures in replace(measurement, data=data).run()["models"].values()
    ]
    assert ["rouge_l" in found for found in names] == [True, False]


def test_a_model_with_another_tokenizer_is_measured_on_the_text_alone(
    measurement: MeasureConfig, foreign: Path
) -> None:
    both = replace(measurement, models=(str(foreign), *measurement.models), teacher=measurement.models[0])
    theirs, own = ({m["name"] for m in measures} for measures in both.run()["models"].values())
    assert own - theirs == {"teacher_kl", "teacher_agreement", "acceptance"}
    assert "bits_per_byte" in theirs


def test_a_student_is_scored_by_its_own_template_and_compared_in_the_teachers(
    measurement: MeasureConfig, teacher: Path, thinker: Path
) -> None:
    answers = [json.loads(line)["response"] for line in Path(measurement.data).read_text().splitlines()]
    whole = replace(measurement, split="all")
    alone = read_measures(whole)
    compared, thinking = (
        read_measures(replace(whole, models=(model,), teacher=str(thinker))) for model in (str(teacher), str(thinker))
    )
    assert compared["bits_per_byte"] == alone["bits_per_byte"]
    sizes = f"{sum(map(len, answers)) + 60:,} tokens, {sum(map(len, answers)):,} bytes"  # with a stop token for each
    assert all(found["bits_per_byte"]["note"].startswith(sizes) for found in (alone, compared, thinking))
    assert f"in the chat template of {thinker}" in compared["teacher_kl"]["note"]
    assert compared["teacher_kl"]["value"] == pytest.approx(0, abs=1e-6)  # one model, on one text
    assert compared["bits_per_byte"]["value"] != thinking["bits_per_byte"]["value"]


def test_documents_with_ids_that_only_the_teacher_has_are_left_out_of_the_comparison(
    measurement: MeasureConfig, teacher: Path, wider: Path
) -> None:
    whole = replace(measurement, split="all", models=(str(teacher),), teacher=str(wider))
    compared = read_measures(whole)
    # a 7 is in the question `i + 1` or its answer for i of 6, 7, 16, 17, ..., 56 and 57
    assert compared["teacher_kl"]["n"] == 48
    assert "12 documents left out, with ids that it lacks" in compared["teacher_kl"]["note"]
    assert compared["bits_per_byte"]["n"] == 60


def test_the_digest_of_what_is_measured_follows_the_documents_alone(measurement: MeasureConfig, tmp_path: Path) -> None:
    copy = shutil.copy(measurement.data, tmp_path / "copy.jsonl")
    whole = replace(measurement, split="all")
    first, second, fewer = (
        stage.run()["data"]["measured_digest"]
        for stage in (whole, replace(whole, data=str(copy)), replace(whole, documents=7))
    )
    assert len(first) == 64
    assert first == second != fewer


def test_a_split_that_is_none_and_a_context_too_long(measurement: MeasureConfig) -> None:
    with pytest.raises(UsageError, match="validation"):
        replace(measurement, split="test").run()
    with pytest.raises(UsageError, match="longer than the 512 tokens"):
        replace(measurement, context=1024).run()
