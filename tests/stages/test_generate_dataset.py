"""A teacher's answers as a data set: what they are, that a stopped stage continues to the same, and that they teach."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.stages.distill.test_run import SETTINGS
from tests.stages.world import saved, written
from tests.tiny import CHATML
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import potstill
from potstill.core.errors import DataError, Interrupted, OutputExists, UsageError
from potstill.data.corpus import load_corpus
from potstill.objectives.config import ObjectiveConfig
from potstill.stages import answer_writer
from potstill.stages import generate_dataset as answering
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.generate_dataset import GenerateDatasetConfig


@pytest.fixture
def speaker(tmp_path: Path, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A teacher that ends most of its answers."""
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[2] = 2 * tiny_llama.model.embed_tokens.weight[40]
    tiny_llama.config.max_position_embeddings = 512
    return saved(tmp_path / "speaker", tiny_llama, tiny_tokenizer)


@pytest.fixture
def stage(speaker: Path, pairs: Path) -> GenerateDatasetConfig:
    return GenerateDatasetConfig(model=str(speaker), data=str(pairs), max_tokens=40, temperature=1.0, dtype="float32")


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_every_prompt_is_answered_or_counted_and_held_out_answers_stay_the_datas_own(
    stage: GenerateDatasetConfig, pairs: Path, tmp_path: Path
) -> None:
    card = stage.run(tmp_path / "made")
    asked = [dict(document) for document in load_corpus(str(pairs)).documents]
    found = rows(tmp_path / "made")
    assert card["details"]["answers"] == len(found) > 10
    assert len(found) + sum(card["details"]["left_out"].values()) == len(asked)
    responses = {document["prompt"]: document["response"] for document in asked}
    assert all(row["prompt"] in responses and row["response"] != responses[row["prompt"]] for row in found)
    kept = load_corpus(str(pairs), split="validation").documents
    assert rows(tmp_path / "made", "validation") == [dict(document) for document in kept]
    assert json.loads((tmp_path / "made" / "card.json").read_text())["stage"] == stage.to_dict()
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"train.jsonl", "validation.jsonl", "card.json"}


def test_python_answers_a_data_set_as_the_stage_does(
    stage: GenerateDatasetConfig, speaker: Path, pairs: Path, tmp_path: Path
) -> None:
    stage.run(tmp_path / "stage")
    options = {"max_tokens": 40, "temperature": 1.0, "dtype": "float32"}
    result = potstill.generate(speaker, data=pairs, out=tmp_path / "python", **options)
    assert not isinstance(result, str)
    assert result["stage"] == stage.to_dict()
    assert rows(tmp_path / "python") == rows(tmp_path / "stage")


def test_several_data_sets_are_answered_as_one(speaker: Path, pairs: Path, tmp_path: Path) -> None:
    lines = pairs.read_text().splitlines(keepends=True)
    files = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for file, part in zip(files, (lines[::2], lines[1::2]), strict=True):
        file.write_text("".join(part))
    result = potstill.generate(speaker, data=files, out=tmp_path / "made", max_tokens=40, temperature=1.0)
    assert not isinstance(result, str)
    prompts = {row["prompt"] for row in rows(tmp_path / "made")}
    for file in files:
        assert prompts & {json.loads(line)["prompt"] for line in file.read_text().splitlines()}


def test_what_is_answered_depends_on_the_seed_and_not_on_the_batch(
    stage: GenerateDatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.run(tmp_path / "made")
    replace(stage, seed=2).run(tmp_path / "other")
    monkeypatch.setattr(answering, "PROMPTS_PER_PART", 7)
    replace(stage, batch=3).run(tmp_path / "again")
    assert rows(tmp_path / "made") == rows(tmp_path / "again") != rows(tmp_path / "other")


def test_a_chat_is_answered_once_so_that_nothing_else_in_it_is_trained_on(
    stage: GenerateDatasetConfig, tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "And you?"},
    ]
    chats: list[Any] = [
        {"messages": [*turns, {"role": "assistant", "content": f"Well, {n}"}, {"role": "user", "content": "Bye"}]}
        for n in range(60)
    ]
    replace(stage, data=str(written(tmp_path / "chats.jsonl", chats))).run(tmp_path / "made")
    (*before, last) = rows(tmp_path / "made")[0]["messages"]
    assert before == turns[:1]
    assert last["role"] == "assistant"
    assert last["content"] != "Good day"


def test_a_chat_that_the_template_refuses_is_left_out_and_counted(
    stage: GenerateDatasetConfig, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "strict.jinja").write_text(refusal + str(tiny_tokenizer.chat_template))
    system = {"role": "system", "content": "Be kind"}
    chats: list[Any] = [
        {
            "messages": [system] * (n % 3 == 0)
            + [{"role": "user", "content": f"Hi {n}"}, {**system, "role": "assistant"}]
        }
        for n in range(30)
    ]
    strict = replace(
        stage, data=str(written(tmp_path / "chats.jsonl", chats)), chat_template=str(tmp_path / "strict.jinja")
    )
    card = strict.run(tmp_path / "made")
    assert card["details"]["left_out"]["a chat that the template refuses"] >= 3
    with pytest.raises(DataError, match="no system; leave such chats out with --on-bad-row skip"):
        replace(strict, on_bad_row="refuse").run(tmp_path / "other")


def test_prompts_with_control_tokens_are_left_out_on_request(stage: GenerateDatasetConfig, tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n}" + "<|im_end|>" * (n % 3 == 0), "response": "Yes"} for n in range(20)]
    data = str(written(tmp_path / "controls.jsonl", pairs))
    card = replace(stage, data=data, special_in_text="refuse").run(tmp_path / "made")
    asked = [document["prompt"] for document in load_corpus(data).documents]
    assert card["details"]["left_out"]["a chat that the template refuses"] == sum("<|" in prompt for prompt in asked)
    assert not any("<|" in row["prompt"] for row in rows(tmp_path / "made"))


def test_a_stopped_stage_continues_to_the_same_answers(
    stage: GenerateDatasetConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "PROMPTS_PER_PART", 16)
    stage.run(tmp_path / "straight")
    original, calls = answer_writer.generate, iter(range(100))

    def stopped(*asked: Any) -> list[list[int]]:
        if next(calls) == 3:  # in the middle of the second part
            raise KeyboardInterrupt
        return original(*asked)

    monkeypatch.setattr(answer_writer, "generate", stopped)
    with pytest.raises(Interrupted, match="--resume"):
        stage.run(tmp_path / "made")
    assert [file.name for file in (tmp_path / "made").iterdir()] == ["training"]
    with pytest.raises(UsageError, match="begun with seed 1, and now it is 3; give what it was"):
        replace(stage, seed=3).run(tmp_path / "made", resume=True)
    (tmp_path / "other.jinja").write_text(f"Hm. {CHATML}")
    with pytest.raises(UsageError, match="begun with another template"):
        replace(stage, chat_template=str(tmp_path / "other.jinja")).run(tmp_path / "made", resume=True)
    stage.run(tmp_path / "made", resume=True)
    assert next(calls) < 12  # the first part was not answered again
    assert rows(tmp_path / "made") == rows(tmp_path / "straight")
    stage.run(tmp_path / "made", resume=True)  # whole already
    with pytest.raises(OutputExists):
        stage.run(tmp_path / "made")


@pytest.mark.slow
def test_a_student_of_the_answers_is_measured_on_the_datas_own(
    stage: GenerateDatasetConfig, speaker: Path, pairs: Path, tmp_path: Path
) -> None:
    stage.run(tmp_path / "made")
    small: dict[str, Any] = {"settings": SETTINGS, "dtype": "float32", "documents": 2}
    learn = DistillConfig(
        teacher=str(speaker), keep=0.755, data=str(pairs), objective=ObjectiveConfig(name="cross_entropy"), **small
    )
    gold = distill(learn, tmp_path / "gold", show=False)
    taught = distill(replace(learn, data=str(tmp_path / "made")), tmp_path / "taught", show=False)
    assert taught.card.data["text_digest"] != gold.card.data["text_digest"]
    assert taught.card.data["measured_digest"] == gold.card.data["measured_digest"]


def test_plain_text_and_answers_that_never_end_are_refused(
    stage: GenerateDatasetConfig, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="has no prompts"):
        replace(stage, data=str(text)).run(tmp_path / "made")
    with pytest.raises(DataError, match="raise --max-tokens"):
        replace(stage, temperature=0.0, max_tokens=1, documents=2).run(tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("change", "said"), [({"max_tokens": 0}, "max_tokens is 0"), ({"temperature": -1.0}, "0 is greedy")]
)
def test_numbers_that_are_none_are_refused(change: dict[str, Any], said: str, stage: GenerateDatasetConfig) -> None:
    with pytest.raises(UsageError, match=said):
        replace(stage, **change)


def test_a_chat_is_answered_at_its_first_turn_that_is_trained_on() -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant") * 3]
    turns[1] = {**turns[1], "fields": '{"weight": 0}'}
    document = {"messages": turns}
    assert answering.truncate_to_first_answer(document) == {"messages": turns[:4]}
