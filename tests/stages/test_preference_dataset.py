"""Preferences for a stage: packs to train on, other prompts to measure on, and what is said of both."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.stages.world import written
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError, UsageError
from potstill.core.types import BASELINE, CHOSEN, REJECTED
from potstill.data.packing import Packs, collate
from potstill.data.preview import render
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.describe_dataset import describe_dataset
from potstill.stages.preference_dataset import prepare_preferences

PAIRS = [{"prompt": f"What is {i} + 1?", "chosen": f"{i + 1}", "rejected": f"It may be {i}."} for i in range(40)]
LABELED = [{"prompt": f"What is {i} + 1?", "completion": f"{i + i % 2}", "label": str(i % 2)} for i in range(40)]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Forty pairs whose shorter answer is chosen."""
    return written(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    """Forty answers, every second one desirable."""
    return written(tmp_path / "labeled.jsonl", LABELED)


def questions(packs: Packs, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    text = str(tokenizer.decode(packs.input_ids.tolist()))
    return [piece.split("?")[0] for piece in text.split("What is ")[1:]]


def test_pairs_are_packed_whole_and_no_prompt_is_trained_on_and_measured_on(
    pairs: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared = prepare_preferences(DatasetConfig(data=str(pairs), context=256), tiny_tokenizer)
    train, validation = (questions(packs, tiny_tokenizer) for packs in (prepared.packs, prepared.validation_packs))
    assert len(train) + len(validation) == len({*train, *validation}) == 40
    assert (prepared.counts.groups, prepared.validation_counts.groups) == (len(train), len(validation))
    batch = collate([prepared.packs[i] for i in range(len(prepared.packs))])
    assert batch["pairs"].shape == (2, len(train))
    assert batch["position_ids"].max() < 256
    assert prepared.counts.shorter_is_chosen == 1.0
    assert prepared.facts["preferences"]["groups"] == len(train)
    assert prepared.facts["measured_on"].endswith(f"{len(validation)} pairs")
    assert json.loads(json.dumps(prepared.facts)) == prepared.facts


def test_preparing_twice_gives_packs_in_one_order_so_that_a_cache_of_a_reference_fits(
    pairs: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = DatasetConfig(data=str(pairs), context=256)
    first, second = (prepare_preferences(config, tiny_tokenizer) for _ in range(2))
    assert first.digest == second.digest
    assert first.packs.digest == second.packs.digest
    other = prepare_preferences(replace(config, seed=2), tiny_tokenizer)
    assert other.packs.digest != first.packs.digest
    assert sorted(questions(other.packs, tiny_tokenizer)) == sorted(questions(first.packs, tiny_tokenizer))


def test_labels_are_groups_of_an_answer_and_its_baseline(
    labeled: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared = prepare_preferences(DatasetConfig(data=str(labeled), context=256), tiny_tokenizer, data="labels")
    batch = collate([prepared.packs[i] for i in range(len(prepared.packs))])
    baselines = batch["sides"] == BASELINE
    own = (batch["sides"] == CHOSEN) | (batch["sides"] == REJECTED)
    assert torch.equal(batch["groups"][baselines], batch["groups"][own])
    assert int(baselines.sum()) == prepared.counts.groups == prepared.counts.chosen + prepared.counts.rejected
    assert prepared.facts["measured_on"].endswith("answers")


def test_labels_that_are_all_alike_are_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = written(tmp_path / "alike.jsonl", [{**row, "label": "1"} for row in LABELED])
    with pytest.raises(DataError, match=r"all \d+ answers of .* are desirable, and KTO learns from the difference"):
        prepare_preferences(DatasetConfig(data=str(path), context=256), tiny_tokenizer, data="labels")


def test_a_context_that_holds_few_pairs_is_warned_of_and_one_that_holds_none_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "rejected": "a" * (100 if i % 4 == 0 else 20)} for i, row in enumerate(PAIRS)]
    path = written(tmp_path / "long.jsonl", rows)
    prepared = prepare_preferences(DatasetConfig(data=str(path), context=100), tiny_tokenizer)
    screen = capsys.readouterr().err
    left_out = prepared.counts.left_out["more tokens than the context"]
    assert 5 < left_out <= 10
    assert f"left out {left_out} with more tokens than the context" in screen
    assert f"% do not fit into --context 100; --context {prepared.counts.covering} holds 99 % of them" in screen
    assert "the shorter answer is chosen in 100.0% of the pairs that differ" in screen
    with pytest.raises(DataError, match=r"no preference of .* can be trained on, .* and --context 20 none"):
        prepare_preferences(DatasetConfig(data=str(path), context=20), tiny_tokenizer)


def test_data_to_measure_on_may_be_given_and_its_prompts_are_not_trained_on(
    pairs: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "chosen": "another"} for row in PAIRS[:10]]
    eval_data = written(tmp_path / "eval.jsonl", rows)
    config = DatasetConfig(data=str(pairs), eval_data=str(eval_data), context=256)
    prepared = prepare_preferences(config, tiny_tokenizer, groups=4)
    assert not set(questions(prepared.packs, tiny_tokenizer)) & {str(i) for i in range(10)}
    assert prepared.validation_counts.groups == 4
    assert "documents are held out too, and are left out of training" in capsys.readouterr().err
    text = written(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="has the columns `text`, which hold no preferences"):
        prepare_preferences(DatasetConfig(data=str(pairs), eval_data=str(text)), tiny_tokenizer)


def test_pairs_are_shown_with_their_prompt_and_both_sides(pairs: Path, labeled: Path, teacher: Path) -> None:
    description = describe_dataset(str(pairs), str(teacher), context=64, split="all")
    assert (description["kind"], description["documents"]) == ("preferences", 40)
    assert description["last_trained"] == {"<|im_end|>": 80}
    example = description["examples"][0]
    (prompt,) = example["pieces"]
    assert prompt["text"].endswith("<|im_start|>assistant")
    trained = {side: pieces[1]["text"] for side, pieces in example["sides"].items()}
    number = int(prompt["text"].split("What is ")[1].split()[0])
    assert trained == {"chosen": f"{number + 1}<|im_end|>", "rejected": f"It may be {number}.<|im_end|>"}
    assert json.loads(json.dumps(description)) == description
    labels = describe_dataset(str(labeled), str(teacher), context=256, split="all")
    assert labels["preferences"] | {"too_long": 0, "chosen": 20, "rejected": 20} == labels["preferences"]
    assert [list(example["sides"]) for example in labels["examples"]] != [["chosen", "rejected"]] * 3


def test_the_screen_marks_both_sides_and_says_what_is_too_long(pairs: Path, teacher: Path) -> None:
    from rich.console import Console

    console = Console(width=200, record=True)
    console.print(render(describe_dataset(str(pairs), str(teacher), context=48, split="all"), marks=True))
    text = console.export_text()
    assert "40 are left out; --context" in text
    assert "packs" not in text
    assert "in 100.0% of the pairs that differ in length" in text
    assert text.index("\nchosen\n") < text.index("\nrejected\n")


def test_columns_of_preferences_may_be_named(tmp_path: Path, teacher: Path) -> None:
    path = written(tmp_path / "odd.jsonl", [{"q": row["prompt"], "a": row["chosen"], "b": "c"} for row in PAIRS])
    columns = "prompt=q,chosen=a,rejected=b"
    assert describe_dataset(str(path), str(teacher), context=256, split="all", columns=columns)["documents"] == 40
    with pytest.raises(UsageError, match="do not define a preference"):
        describe_dataset(str(path), str(teacher), context=256, split="all", columns=f"{columns},worse=b")
