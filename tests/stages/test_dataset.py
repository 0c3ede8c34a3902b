"""Text for a stage: columns by another name reach every verb that reads."""

import json
from pathlib import Path

import pytest
from datasets import IterableDataset
from tests.stages.world import written
from transformers import PreTrainedTokenizerFast

from potstill.core.errors import DataError, UsageError
from potstill.data.corpus import Corpus, load_corpus
from potstill.stages.corpus import parse_columns
from potstill.stages.dataset import (
    build_rows,
    check_has_end,
    compute_measured_digest,
    load_held_out_corpus,
    prepare_dataset,
)
from potstill.stages.dataset_config import DatasetConfig
from potstill.stages.describe_dataset import describe_dataset
from potstill.stages.measure import MeasureConfig

SAID = "prompt=instruction, response=text"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Prompts and responses under names that mean something else."""
    return written(tmp_path / "odd.jsonl", [{"instruction": f"Say {i}.", "text": f"It is {i}."} for i in range(60)])


def test_columns_are_told_by_name_and_by_nothing_else() -> None:
    assert parse_columns(SAID) == {"prompt": "instruction", "response": "text"}
    assert parse_columns("") is None
    for wrong in ("prompt", "prompt=", "=text", "prompt=a,,response=b"):
        with pytest.raises(UsageError, match="prompt=instruction,response=text"):
            parse_columns(wrong)


def test_long_documents_are_measured_by_their_beginnings_and_short_ones_whole(
    teacher: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    long = written(tmp_path / "long.jsonl", [{"text": "a" * 3_000}, {"text": "b" * 1_700}])
    rows = build_rows(load_corpus(str(long), split="all"), tiny_tokenizer, documents=5)
    assert sorted(row.num_bytes for row in rows) == [1_700 - 1, 2_000 - 1]


def test_packs_are_drawn_from_all_documents_however_long_each_is(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    letters = "abcdefghijklmnopqrst"
    path = written(tmp_path / "books.jsonl", [{"text": letter * 4_000} for letter in letters])
    found = prepare_dataset(DatasetConfig(data=str(path), context=64), tiny_tokenizer, tokens=2_000)
    first = {tiny_tokenizer.decode(found.packs[i]["input_ids"][1:2]) for i in range(32)}
    assert len(first) > 8


def test_named_columns_are_read_where_unnamed_ones_are_refused(odd: Path, teacher: Path) -> None:
    with pytest.raises(DataError, match="--columns prompt=NAME,response=NAME"):
        describe_dataset(str(odd), str(teacher), context=64, split="all")
    assert describe_dataset(str(odd), str(teacher), context=64, split="all", columns=SAID)["kind"] == "pairs"
    assert load_held_out_corpus(DatasetConfig(data=str(odd), columns=SAID)).kind == "pairs"
    measured = MeasureConfig(models=(str(teacher),), data=str(odd), columns=SAID, context=64, speed=False, prompts=2)
    (found,) = measured.run()["models"].values()
    assert "rouge_l" in {measure["name"] for measure in found}


def test_what_is_trained_on_is_never_measured_on_under_another_name(
    odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = load_held_out_corpus(DatasetConfig(data=str(odd), columns=SAID)).digest
    for name in (str(odd), "odd.jsonl", "./odd.jsonl"):
        assert load_held_out_corpus(DatasetConfig(data=str(odd), eval_data=name, columns=SAID)).digest == own
    with pytest.raises(UsageError, match="contain one another"):
        load_held_out_corpus(DatasetConfig(data=str(tmp_path), eval_data=str(odd), columns=SAID))


def test_chats_that_do_not_fit_are_counted_on_the_screen_and_in_the_facts(
    tiny_tokenizer: PreTrainedTokenizerFast, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Question {i} " + "a" * (90 if i % 4 == 0 else 1), "response": f"Yes {i}."} for i in range(60)]
    path = written(tmp_path / "long.jsonl", rows)
    found = prepare_dataset(DatasetConfig(data=str(path), context=64), tiny_tokenizer, tokens=2_000)
    counts = found.facts["windows"]
    assert 0 < counts["shortened"] < counts["documents"] / 2
    screen = capsys.readouterr().err
    assert f"{counts['shortened']} lost the beginning of what precedes an answer" in screen
    assert f"warning: {path}: " in screen
    assert f"--context {counts['longest']} holds 99 % of them whole" in screen
    again = prepare_dataset(DatasetConfig(data=str(path), context=counts["longest"]), tiny_tokenizer, tokens=2_000)
    assert "shortened" not in again.facts["windows"]
    packs = describe_dataset(str(path), str(teacher), context=64, split="train")["packs"]
    assert (packs["windows"], len(packs["loss"])) == (counts, 2)


def test_what_is_measured_on_is_not_trained_on_and_said(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"document {i}"} for i in range(60)]
    data, eval_data = written(tmp_path / "a.jsonl", rows), written(tmp_path / "b.jsonl", rows[:20])
    config = DatasetConfig(data=str(data), eval_data=str(eval_data), context=64)
    prepared = prepare_dataset(config, tiny_tokenizer, tokens=2_000)
    trained = str(tiny_tokenizer.decode(prepared.packs.input_ids.tolist())).split("<|im_end|>")
    measured = {str(tiny_tokenizer.decode(row.input_ids)) for row in prepared.rows}
    assert measured == {row["text"] for row in rows[:20]}
    assert not measured & set(trained)
    assert 35 <= len([text for text in trained if text]) <= 40
    removed = prepared.facts["dropped"]["content that is held out"]
    assert f"{removed} documents are held out too, and are left out of training" in capsys.readouterr().err


def test_a_folder_to_measure_on_is_taken_whole_unless_its_files_name_a_split(tmp_path: Path) -> None:
    data = written(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(60)])
    (tmp_path / "whole").mkdir()
    written(tmp_path / "whole" / "rows.jsonl", [{"text": f"other {i}"} for i in range(30)])
    config = DatasetConfig(data=str(data), eval_data=str(tmp_path / "whole"))
    assert len(load_held_out_corpus(config)) == 30
    written(tmp_path / "whole" / "dev.jsonl", [{"text": f"third {i}"} for i in range(5)])
    assert len(load_held_out_corpus(config)) == 5


def test_chats_of_several_answers_have_another_digest_where_only_the_last_is_scored(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    for count, is_equal in ((2, True), (4, False)):
        file = tmp_path / f"{count}.jsonl"
        file.write_text(json.dumps({"messages": turns[:count]}) + "\n")
        corpus = load_corpus(str(file), split="all")
        digests = [compute_measured_digest(corpus, documents=1, only_last=only_last) for only_last in (False, True)]
        assert (digests[0] == digests[1]) == is_equal


def test_a_stream_is_read_to_its_end_only_where_tokens_limit_it() -> None:
    stream = Corpus("owner/name", "text", IterableDataset.from_generator(lambda: iter([])), None, None, {})
    check_has_end(stream, 2_000)
    with pytest.raises(UsageError, match="owner/name is streamed and may never end; limit it with --tokens"):
        check_has_end(stream, None)
